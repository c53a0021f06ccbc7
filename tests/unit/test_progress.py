"""What is shown while a run trains: lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io

from rich.console import Console

from meshlm.training import progress
from meshlm.training.progress import TrainingProgress


def line(loss: float | None = 2.5) -> dict:
    return {"loss": loss, "tokens_per_s": 1234.5, "learning_rate": 1e-3}


def test_lines_without_a_terminal(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    with TrainingProgress(tmp_path, console, start=0, total=1000) as shown:
        shown.say("hello [bold]world[/bold]")
        for step in range(1, 101):
            shown.step(step, line(2.5 if step % 2 else None))
            now[0] += 1.0
        shown.step(1000, line())
    lines = out.getvalue().splitlines()
    assert lines[0] == "hello [bold]world[/bold]"
    # One every ten seconds and the last one.
    steps = [text.split("  ")[0] for text in lines[1:]]
    assert steps == [f"step {n}/1,000" for n in range(1, 101, 10)] + ["step 1,000/1,000"]
    assert "first step compiles" in lines[1]
    # 10 seconds for 10 steps after the first, 989 to go.
    assert lines[2].endswith("loss 2.5000  1,234 tok/s  lr 1.00e-03  16.5 min left")
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [entry.partition(" ")[2].partition(" ")[2] for entry in log] == lines


def test_a_bar_on_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with TrainingProgress(tmp_path, console, start=5, total=10) as shown:
        shown.step(6, line())
        shown.say("a line above the bar")
    assert "6/10" in out.getvalue()
    assert "loss 2.500" in out.getvalue()
    assert "1,234 tok/s" in out.getvalue()
    assert "a line above the bar" in out.getvalue()
    assert "step 6/10" not in out.getvalue()
    assert "step 6/10" in (tmp_path / "log.txt").read_text()


def test_losses_that_are_none(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=False)
    with TrainingProgress(tmp_path, console, start=0, total=1) as shown:
        shown.step(1, line(None))
    assert "loss -" in (tmp_path / "log.txt").read_text()
