"""launch/train_ray.py on a real Ray: two workers train; one is killed, and all go on."""

from __future__ import annotations

import signal
import sys

import psutil
import pytest

from programs import LAUNCH, Program, eventually, find
from runs import SMALL, lines

pytestmark = pytest.mark.timeout(400)

STEPS = 400


def launch(ray, folder, *words) -> Program:
    """The template with two workers."""
    _, env = ray
    command = [sys.executable, LAUNCH / "train_ray.py", "--workers", "2", "--failures", "3", "--"]
    return Program([*command, *words], folder / "log", env)


def test_two_workers_train_and_go_on_after_one_was_killed(ray, store, tmp_path):
    run = tmp_path / "run"
    options = (f"--run={run}", f"--data={store}", f"--steps={STEPS}", "--mesh.data=2")
    program = launch(ray, tmp_path, *SMALL, *options, "--checkpoint-every=10")

    def has_saved() -> bool:
        assert program.process.poll() is None, program.text
        return (run / "checkpoints" / "step_10").is_dir()

    try:
        eventually(has_saved, 240, lambda: program.text)
        processes = [p for p in find("train", f"--run={run}") if "--workers" not in p.cmdline()]
        assert len(processes) == 2
        processes[0].send_signal(signal.SIGKILL)
        assert program.process.wait(240) == 0, program.text
    finally:
        program.end()
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert f"resumed from {run}/checkpoints/step_" in program.text
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))


def test_a_wrong_command_is_handed_back_at_once(ray, store, tmp_path):
    options = (f"--run={tmp_path / 'run'}", f"--data={store}", "--steps=2", "--mesh.data=3")
    program = launch(ray, tmp_path, *SMALL, *options)
    try:
        assert program.process.wait(240) == 2, program.text
    finally:
        program.end()
