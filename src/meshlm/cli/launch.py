"""meshlm launch local"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Annotated, TextIO

from tyro.conf import arg

from meshlm.core.errors import MeshLMError, UsageError

EXAMPLES = (
    "meshlm launch local -n 2 -- train --run runs/two --data store --mesh.data 2",
    "meshlm launch local -n 2 --devices 4 -- train --run runs/eight --data store --mesh.data 8",
)
_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_GRACE_S = 10.0
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1
_BEGIN = "from meshlm.cli.launch import begin; begin()"
_SAVED = (75, 130)
_OWN_OPTIONS = ("--coordinator", "--num-processes", "--process-id")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run `meshlm train`, given after --, as several processes on this machine.

    Shown are the lines of process 0, and of the others what goes to standard error. SIGTERM and
    SIGINT are passed on. When one process fails or is killed, the others end too.
    """

    n: Annotated[int, arg(aliases=("-n",))] = 2
    """Processes."""
    devices: int | None = None
    """Virtual CPU devices of each process. [one, or as XLA_FLAGS says]"""


def run(config: Config, words: Sequence[str]) -> int:
    """Runs the processes until all have ended; returns the exit code that says most."""
    for option, value in (("-n", config.n), ("--devices", config.devices)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: give 1 or more")
    _check_words(words)
    processes = _Processes(config, words)
    handlers = {n: signal.signal(n, processes.pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        processes.start()
        return processes.wait()
    finally:
        processes.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_words(words: Sequence[str]) -> None:
    if list(words[:1]) != ["train"]:
        what = f"{words[0]} is no command for several processes" if words else "nothing to run"
        raise UsageError(f"{what}: write meshlm launch local -n 2 -- train ...")
    for word in words:
        option = word.partition("=")[0]
        if option in _OWN_OPTIONS:
            raise UsageError(
                f"{option}: meshlm launch local gives it to each process: leave it out"
            )


def begin() -> None:
    """Runs `meshlm` in a process of ours, which gets SIGTERM should its starter be killed."""
    from meshlm.cli.main import main

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    sys.exit(main())


class _Processes:
    """The processes of a run on this machine, and the threads that show what they say."""

    def __init__(self, config: Config, words: Sequence[str]) -> None:
        self._config, self._words = config, words
        self._lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._running: list[subprocess.Popen[str]] = []
        self._told: int | None = None

    def start(self) -> None:
        """Starts them; raises MeshLMError where the system refuses one."""
        address = f"127.0.0.1:{_free_port()}"
        for number in range(self._config.n):
            process = self._start(number, address)
            self._running.append(process)
            assert process.stdout is not None
            assert process.stderr is not None
            shown = sys.stdout if number == 0 else None
            self._read(number, process.stdout, shown)
            self._read(number, process.stderr, sys.stderr)
            if self._told is not None:  # a signal came before this one was there
                process.send_signal(self._told)

    def _start(self, number: int, address: str) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                [sys.executable, "-c", _BEGIN, *self._words],
                env=_environment(self._config, address, number),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # A terminal's Ctrl-C comes to us alone, and goes on from here once.
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise MeshLMError(
                f"process {number} cannot be started ({error.strerror}): give a smaller -n, or "
                "end other programs"
            ) from None

    def wait(self) -> int:
        """Returns the exit code when all have ended; some seconds after a failure it ends them."""
        failed: list[tuple[int, int]] = []  # (number, exit code), the first to fail first
        until_s = None
        while any(process.poll() is None for process in self._running):
            failed = self._add_failed(failed)
            if failed and until_s is None:
                until_s = time.monotonic() + _GRACE_S
            if until_s is not None and time.monotonic() > until_s:
                self.kill()
            time.sleep(_POLL_S)
        for reader in self._readers:
            reader.join()
        failed = self._add_failed(failed)
        codes = [code for _, code in failed]
        return next((code for code in codes if code not in _SAVED), codes[0] if codes else 0)

    def pass_on(self, number: int, frame: object) -> None:
        """Gives a signal to each process that runs, and that is yet to be started."""
        self._told = number
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Ends what still runs, and says so."""
        for number, process in enumerate(self._running):
            if process.poll() is None:
                process.kill()
                process.wait()
                self._say(f"process {number} did not end by itself and was killed")

    def _add_failed(self, failed: list[tuple[int, int]]) -> list[tuple[int, int]]:
        known = {number for number, _ in failed}
        for number, process in enumerate(self._running):
            code = process.poll()
            if code and number not in known:
                if code < 0 and not failed:
                    self._say(f"process {number} was ended by {signal.Signals(-code).name}")
                failed = [*failed, (number, code if code > 0 else 128 - code)]
        return failed

    def _say(self, text: str) -> None:
        with self._lock:
            print(f"meshlm: {text}", file=sys.stderr, flush=True)

    def _read(self, number: int, stream: IO[str], shown: TextIO | None) -> None:
        def read() -> None:
            with stream:
                for line in stream:
                    if shown is not None:
                        with self._lock:
                            print(f"[{number}] {line}", end="", file=shown, flush=True)

        self._readers.append(threading.Thread(target=read, daemon=True))
        self._readers[-1].start()


def _environment(config: Config, address: str, number: int) -> dict[str, str]:
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(config.n),
        "JAX_PROCESS_ID": str(number),
    }
    if config.devices is not None:
        flags = os.environ.get("XLA_FLAGS", "").split()
        kept = [flag for flag in flags if not flag.startswith(_DEVICES_FLAG)]
        environment["XLA_FLAGS"] = " ".join([*kept, f"{_DEVICES_FLAG}={config.devices}"])
    return environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
