"""`meshlm demo`: from the Python library's source text to a model that writes, and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshlm.checkpoint import complete_steps
from meshlm.data.store import TokenStore
from meshlm.demo import PROMPTS, library_files

STEPS = 20  # the fewest that a demo trains


def test_the_corpus_is_source_text_without_tests() -> None:
    files = library_files()
    assert any(path.name == "textwrap.py" for path in files)
    assert all(path.suffix == ".py" for path in files)
    assert not [p for p in files if {"test", "tests", "site-packages"} & set(p.parts[-4:-1])]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_it_trains_and_writes_and_goes_on(
    tmp_path: Path, cli: Any, compiled: dict[str, str]
) -> None:
    command = ("demo", "--minutes", "0.01", "--out", "d")
    done = cli(*command, cwd=tmp_path, env=compiled, timeout_s=800)
    assert done.returncode == 0, done.stderr
    for said in (*(repr(prompt) for prompt in PROMPTS), "bits per byte", "verify d/run"):
        assert said in done.stdout
    run = tmp_path / "d" / "run"
    assert complete_steps(run / "checkpoints")[-1] == STEPS
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 1
    assert (run / "report.html").stat().st_size > 10_000
    store = TokenStore.open(tmp_path / "d" / "data")
    assert store.num_tokens("val") > 10_000

    again = cli(*command, cwd=tmp_path, env=compiled, timeout_s=400)
    assert again.returncode == 0, again.stderr
    assert "a run is there already" in again.stdout
    assert (run / "metrics.jsonl").read_text().count("\n") == STEPS
