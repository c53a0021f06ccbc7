"""`meshlm launch local`: what it starts, shows, passes on and ends. Its processes are small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from meshlm.cli import launch
from meshlm.core.errors import MeshLMError, UsageError

# Stands in for a process of ours: says its place, then does what it is told.
PROGRAM = """
import os, signal, sys, time
number = os.environ["JAX_PROCESS_ID"]
print("place", number, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"],
      os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", ""), flush=True)
print("error of", number, file=sys.stderr, flush=True)
{what}
"""


@pytest.fixture
def instead(monkeypatch):
    def set_program(what: str) -> None:
        monkeypatch.setattr(launch, "_BEGIN", PROGRAM.format(what=textwrap.dedent(what)))
        monkeypatch.setattr(launch, "_GRACE_S", 0.5)

    return set_program


def run(n: int = 2, devices: int | None = None) -> int:
    return launch.run(launch.Config(n=n, devices=devices), ["train", "--run", "x"])


def test_places_and_what_is_shown(instead, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8")
    instead("")
    assert run(3, devices=2) == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    words = line.split()
    assert words[:4] == ["[0]", "place", "0", "3"]
    assert words[4].startswith("127.0.0.1:")
    assert words[5:] == ["--a=1", "--xla_force_host_platform_device_count=2", "cpu"]
    assert sorted(err.splitlines()) == [f"[{n}] error of {n}" for n in range(3)]


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("sys.exit(3 if number == '1' else 0)", 3),
        ("sys.exit(75)", 75),
        ("sys.exit(2 if number == '1' else 75)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL) if number == '1' else None", 137),
    ],
)
def test_the_exit_code_says_most(instead, capfd, what, code):
    instead(what)
    assert run() == code


def test_who_does_not_follow_is_ended(instead, capfd):
    instead("os.kill(os.getpid(), signal.SIGKILL) if number == '1' else time.sleep(60)")
    began_s = time.monotonic()
    assert run() == 137
    assert time.monotonic() - began_s < 20
    err = capfd.readouterr().err
    assert "meshlm: process 1 was ended by SIGKILL" in err
    assert "meshlm: process 0 did not end by itself and was killed" in err


LAUNCH = """
import sys
from meshlm.cli import launch
launch._BEGIN = {program!r}
sys.exit(launch.run(launch.Config(n=2), ["train"]))
"""
# (A handler in Python is not run while the call sleeps that follows just after the signal.)
WAITS = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", os.getpid(), file=sys.stderr, flush=True)
sys.exit(75 if signal.sigtimedwait([signal.SIGTERM], 60) else 1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_are_passed_on_and_nobody_is_left(number):
    program = PROGRAM.format(what=WAITS).replace(
        "import os, signal", f"import ctypes, os, signal\n{PARENT_DEATH}\nimport os"
    )
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(program=program)], stderr=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stderr is not None
        pids = []
        while len(pids) < 2:
            line = starter.stderr.readline()
            if "ready" in line:
                pids.append(int(line.split()[-1]))
        starter.send_signal(number)
        code = starter.wait(20)
    assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    until_s = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until_s
        time.sleep(0.05)


def test_who_was_started_ends_where_another_cannot_be(instead, capfd, monkeypatch):
    instead("time.sleep(60)")
    started, handler = [], signal.getsignal(signal.SIGTERM)
    popen = subprocess.Popen

    def start(*arguments, **options):
        assert signal.getsignal(signal.SIGTERM) != handler  # it would be passed on
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(MeshLMError, match="process 1 cannot be started"):
        run()
    assert started[0].poll() == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == handler


# As `begin` does it, without the command line behind it.
PARENT_DEATH = "ctypes.CDLL(None).prctl(1, 15)"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("n", "devices", "words", "message"),
    [
        (0, None, ["train"], "-n 0: give 1 or more"),
        (2, 0, ["train"], "--devices 0: give 1 or more"),
        (2, None, [], "write meshlm launch local -n 2 -- train"),
        (2, None, ["serve"], "write meshlm launch local -n 2 -- train"),
    ],
)
def test_what_it_cannot_run_is_refused(n, devices, words, message):
    with pytest.raises(UsageError) as caught:
        launch.run(launch.Config(n=n, devices=devices), words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to run: write meshlm launch local -n 2 -- train"),
        (["generate", "runs/x"], "generate is no command for several processes"),
        (["train", "--process-id", "1"], "--process-id: meshlm launch local gives it"),
        (["train", "--coordinator=127.0.0.1:1"], "--coordinator: meshlm launch local gives it"),
    ],
)
def test_what_cannot_be_launched_is_refused_at_once(words, said):
    with pytest.raises(UsageError, match=said):
        launch.run(launch.Config(), words)
