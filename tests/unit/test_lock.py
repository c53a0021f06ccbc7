"""The lock of a run folder: one holder, named to the second, gone with its process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshlm.core.errors import BusyError
from meshlm.training.lock import LOCK_NAME, RunLock

HOLD = """
import sys
from pathlib import Path
from meshlm.training.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with RunLock(folder), pytest.raises(BusyError) as caught, RunLock(folder):
        pass
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert f"process {os.getpid()} on {socket.gethostname()}" in message
    assert str(folder) in message
    assert "\n" not in message


def test_it_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(3):
        with RunLock(tmp_path):
            pass
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path), RunLock(tmp_path / "other"):
        pass


def test_a_killed_holder_does_not_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"process {process.pid} on"), RunLock(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunLock(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 10, b"123"])
def test_a_strange_lock_file_is_no_problem(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_NAME).write_bytes(content)
    with RunLock(tmp_path) as lock:
        assert lock._file is not None
        (tmp_path / LOCK_NAME).write_bytes(content)
        with pytest.raises(BusyError, match="in use by another process"), RunLock(tmp_path):
            pass
