"""The watch over the processes of a run: when one dies or fails, all end, each with one line.

Three threads run beside the work in every process. One gives a sign of life in the coordinator's
key-value store, and in process 0 looks for processes that have stopped doing so. The second waits
for messages: from a process that fails, or from process 0 about one that is silent. The third ends
the process when its own signs of life no longer reach process 0. Each ends the process at once,
because the main thread may hang for good in a sum over devices that nobody else will join.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from meshlm.core.address import split_address
from meshlm.core.waiting import Waiting

_BEATS, _WORDS, _HEARD, _END = "meshlm/beat", "meshlm/words", "meshlm/heard", "meshlm/end"
_BEATS_A_TIMEOUT = 6
_LISTEN_MS = 60 * 60 * 1000
_LINGER_S = 5.0
_END_TIMEOUT_MS = 60 * 60 * 1000
_REMEDY = (
    "it was killed, or its machine or network is down; run the same command again to go on from "
    "the last checkpoint"
)
_FIRST_IS_GONE = f"process 0 is gone: {_REMEDY}"


class Watch:
    """Watches from when it is made until this process leaves.

    Args:
        client: JAX's connection to the coordinator.
        address: HOST:PORT of the coordinator, which lives in process 0.
        timeout_s: without a sign of life, after which a process counts as dead.
    """

    def __init__(
        self, client: Any, address: str, number: int, count: int, timeout_s: float
    ) -> None:
        self.number, self.count = number, count
        self._place = split_address(address)
        self._client, self._timeout_s = client, timeout_s
        self._pause_s = timeout_s / _BEATS_A_TIMEOUT
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._beats_heard = 0
        self._failed_with: int | None = None
        self._threads = [
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True)
            for work in (self._beat, self._listen, self._mind_first)
        ]
        for thread in self._threads:
            thread.start()
        self._on_abort = _Handler(self._abort)  # kept, for the C library has its address only
        _set_abort_handler(self._on_abort)
        # For a program that does not say when it leaves. JAX's own handler comes after it.
        atexit.register(self.end)

    def say_failed(self, reason: str, exit_code: int) -> None:
        """Tells all why this process ends. The first that speaks is heard."""
        self._failed_with = exit_code
        self._say(f"process {self.number}: {reason}", exit_code, dead=None)

    def blame_the_silent(self) -> None:
        """Ends all, with its number, where a process gives no sign of life; returns if none does.

        For an exchange between devices that has failed: it does not say whose end was missing.
        """
        before = self._beats()
        time.sleep(2.5 * self._pause_s)
        now = self._beats()
        silent = [n for n, beat in now.items() if n != str(self.number) and beat == before[n]]
        if silent:
            self._say_dead(int(silent[0]), 2.5 * self._pause_s)
            self._threads[1].join()  # which hears it too, and ends this process

    def end(self) -> None:
        """Returns when every process has come here; ends this one at once where it has failed."""
        if self._over.is_set():
            self._threads[1].join()  # it may be about to end the process
            return
        if self._failed_with is not None:
            self._over.set()
            self._end_after_words(self._failed_with, dead=None)
        _set_abort_handler(None)
        with (
            Waiting(lambda: f"process {self.number} is done and waits for the others to end"),
            contextlib.suppress(Exception),
        ):
            self._client.wait_at_barrier(_END, _END_TIMEOUT_MS)
        self._over.set()
        # Python must not end while a thread is inside of JAX: the process would be aborted.
        with contextlib.suppress(Exception):
            if self.number == 0:
                self._client.key_value_set(_WORDS, json.dumps({"by": None}))
        for thread in self._threads:
            thread.join(_LINGER_S)

    def _say(self, message: str, exit_code: int, *, dead: int | None) -> None:
        words = {"by": self.number, "message": message, "exit_code": exit_code, "dead": dead}
        with contextlib.suppress(Exception):
            self._client.key_value_set(_WORDS, json.dumps(words))

    def _beat(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        for beat in range(sys.maxsize):
            # `_mind_first` acts where the coordinator cannot be reached.
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"{_BEATS}/{self.number}", str(beat), True)
                self._beats_heard = beat
                if self.number == 0:
                    self._look_around(seen)
            if self._over.wait(self._pause_s):
                return

    def _mind_first(self) -> None:
        """Ends this process when no sign of life has reached process 0 for the timeout.

        It counts its own wake-ups and not seconds: work that holds Python's lock delays both.
        """
        heard, missed = -1, 0
        while self.number != 0 and not self._over.wait(self._pause_s):
            missed = missed + 1 if self._beats_heard == heard else 0
            heard = self._beats_heard
            if missed > _BEATS_A_TIMEOUT and self._begin_to_end(_FIRST_IS_GONE):
                _exit(1)  # nothing is sent first: it would wait for the same connection

    def _look_around(self, seen: dict[str, tuple[str, float]]) -> None:
        now_s = time.monotonic()
        for number, beat in self._beats().items():
            if number not in seen or seen[number][0] != beat:
                seen[number] = (beat, now_s)
            elif now_s - seen[number][1] > self._timeout_s:
                self._say_dead(int(number), self._timeout_s)

    def _beats(self) -> dict[str, str]:
        """Returns the last sign of life of each process by its number."""
        found = self._client.key_value_dir_get(f"{_BEATS}/")
        return {str(n): "" for n in range(self.count)} | {
            key.rpartition("/")[2]: beat for key, beat in found
        }

    def _say_dead(self, number: int, silent_s: float) -> None:
        text = f"process {number} has given no sign of life for {silent_s:.3g} s: {_REMEDY}"
        self._say(text, 1, dead=number)

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                words = json.loads(self._client.blocking_key_value_get(_WORDS, _LISTEN_MS))
            except Exception as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                words = {"by": 0, "message": _FIRST_IS_GONE, "exit_code": 1}
            ours = words["by"] == self.number and words.get("dead") is None
            if ours or words["by"] is None or not self._begin_to_end(words["message"]):
                return
            self._end_after_words(words["exit_code"], dead=words.get("dead"))

    def _begin_to_end(self, message: str) -> bool:
        """Writes why this process ends; returns False where another thread has done so."""
        with self._ending:
            if self._over.is_set():
                return False
            self._over.set()
            _write_line(f"meshlm: {message}")
            return True

    def _abort(self, number: int) -> None:
        """Ends the process in place of `abort`, by which JAX ends it when process 0 is gone.

        JAX learns of that at the same moment as `_listen`, and has no gentler way.
        """
        if self._over.is_set():  # `_listen` was faster
            time.sleep(_LINGER_S)
        elif self.number != 0 and not self._reaches_first():
            _write_line(f"meshlm: {_FIRST_IS_GONE}")
        else:
            _set_abort_handler(None)
            os.abort()
        _exit(1)

    def _reaches_first(self) -> bool:
        try:
            socket.create_connection(self._place, timeout=1).close()
        except OSError:
            return False
        return True

    def _end_after_words(self, exit_code: int, *, dead: int | None) -> None:
        """Ends this process; process 0, which the others hear through, as the last one."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HEARD}/{self.number}", "")
        until_s = time.monotonic() + _LINGER_S
        living = self.count - (dead is not None)
        while self.number == 0 and time.monotonic() < until_s:
            with contextlib.suppress(Exception):
                if len(self._client.key_value_dir_get(f"{_HEARD}/")) >= living:
                    break
            time.sleep(0.05)
        _exit(exit_code)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _set_abort_handler(handler: Any) -> None:
    """Sets what C calls on SIGABRT, None for its default; Python's handlers run too late."""
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes = (ctypes.c_int, ctypes.c_void_p)
    set_handler.restype = ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p) if handler else None)


def _write_line(text: str) -> None:
    # Not through sys.stderr: the thread that is stuck may hold its lock.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _exit(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)
