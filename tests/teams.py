"""Runs of several real processes: started by hand, each with its own output and its own end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conftest import CommandLine

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Ended:
    """What a process left, and when it was seen to have ended (`time.monotonic`)."""

    code: int
    out: str
    err: str
    at_s: float

    @property
    def said(self) -> str:
        """Its last line for a person; what JAX itself prints is left out."""
        lines = [line for line in self.err.splitlines() if line.startswith("meshlm: ")]
        return lines[-1].removeprefix("meshlm: ") if lines else ""


class Team:
    """`meshlm ARGUMENTS` as several processes that find each other by the environment."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str | Path],
        *,
        count: int = 2,
        devices: int = 1,
        env: Mapping[str, str] | None = None,
        env_of: Mapping[int, Mapping[str, str]] | None = None,
        absent: Sequence[int] = (),
        port: int | None = None,
        reads: bool = False,
        small_files_of: int | None = None,
        host: str = "127.0.0.1",
        within: Sequence[Sequence[str]] = (),
    ) -> None:
        """Starts the processes; `within` are the commands inside of which each of them runs."""
        address = f"{host}:{free_port() if port is None else port}"
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            if number in absent:
                continue
            command = CommandLine.command(*arguments)
            if reads:
                log = folder / f"reads-{number}"
                words = [str(HERE / "reading_meshlm.py"), str(log), *command[1:]]
                command = [sys.executable, *words]
            if number == small_files_of:  # as on a disk that is full
                command = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *command]
            if within:
                command = [*within[number], *command]
            environment = {
                **CommandLine.environment(devices),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
                **(env or {}),
                **((env_of or {}).get(number, {})),
            }
            with (
                (folder / f"out-{number}").open("wb") as out,
                (folder / f"err-{number}").open("wb") as err,
            ):
                self.running[number] = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )

    def send(self, number: int, signal_number: int) -> float:
        """Sends a signal; returns when."""
        self.running[number].send_signal(signal_number)
        return time.monotonic()

    def wait_for_step(self, run: Path, step: int, timeout_s: float = 180) -> None:
        """Returns when the metrics have that step's line."""
        path, until_s = run / "metrics.jsonl", time.monotonic() + timeout_s
        while not (path.exists() and f'"step": {step},' in path.read_text()):
            assert time.monotonic() < until_s, f"step {step} did not come: {self._errors()}"
            assert all(p.poll() is None for p in self.running.values()), self._errors()
            time.sleep(0.01)

    def wait(self, timeout_s: float = 300) -> list[Ended]:
        """Returns how each one ended, in the order of their numbers."""
        until_s, ended_s = time.monotonic() + timeout_s, {}
        while len(ended_s) < len(self.running):
            assert time.monotonic() < until_s, f"still running: {self._errors()}"
            for number, process in self.running.items():
                if process.poll() is not None:
                    ended_s.setdefault(number, time.monotonic())
            time.sleep(0.01)
        return [
            Ended(
                code=process.returncode,
                out=(self.folder / f"out-{number}").read_text(errors="replace"),
                err=(self.folder / f"err-{number}").read_text(errors="replace"),
                at_s=ended_s[number],
            )
            for number, process in self.running.items()
        ]

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _errors(self) -> str:
        return "\n".join((self.folder / f"err-{n}").read_text() for n in self.running)
