"""Programs that the tests of tests/engines start: with all that they start, ended by process id."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from conftest import CommandLine

T = TypeVar("T")

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
_PR_SET_CHILD_SUBREAPER = 36

# Whatever loses its parent becomes a child of this process, so that it can be found and ended.
ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Program:
    """A program that was started, with all that it starts."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, env: Mapping[str, str], **options: object
    ) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(env),
                **options,
            )

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Kills it and all below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            end_all([psutil.Process(self.process.pid)])
        self.process.wait()


def find(*words: str) -> list[psutil.Process]:
    """Returns the processes that the tests have started whose command line has these words."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if set(words) <= set(process.cmdline()):
                found.append(process)
    return found


def end_all(processes: Sequence[psutil.Process]) -> None:
    """Kills processes and all below them."""
    below = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            below += process.children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=10)


def eventually(check: Callable[[], T], timeout_s: float, said: Callable[[], str] = lambda: "") -> T:
    """Returns what `check` returns once that is true."""
    until_s = time.monotonic() + timeout_s
    while True:
        if found := check():
            return found
        assert time.monotonic() < until_s, f"not within {timeout_s:.0f} s: {said()[-4000:]}"
        time.sleep(0.2)


def environment(**more: str) -> dict[str, str]:
    """A user's environment in which JAX has one CPU."""
    return {**CommandLine.environment(), "JAX_PLATFORMS": "cpu", **more}


def need(*programs: str) -> None:
    """Skips the test, with a line, where a program is missing."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: environment/engines.sh installs it on Debian")
