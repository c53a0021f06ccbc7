"""Training runs as the end-to-end tests make them, and what they look at in the folder."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshlm import checkpoint

# Small and quick: 8 sequences of 32 tokens a step.
SMALL = ("--preset", "test", "--batch-size", "8", "--seq-len", "32", "--sample-every", "0")
# What a rerun cannot repeat.
TIMINGS = ("tokens_per_s", "step_s", "data_wait_s", "mfu")


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, read strictly: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"metrics.jsonl has {name}")

    content = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in content]


def repeatable(run: Path) -> list[dict[str, Any]]:
    """The metrics without the measured times."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(run)]


def arrays(step: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint."""
    infos = checkpoint.read_manifest(step).arrays
    abstract = {n: jax.ShapeDtypeStruct(i.shape, i.dtype) for n, i in infos.items()}
    return {name: np.asarray(x) for name, x in checkpoint.restore(step, abstract).items()}


def assert_same_run(run: Path, other: Path, step: int) -> None:
    """Every line of the metrics and every bit of the last state agree."""
    assert repeatable(run) == repeatable(other)
    one, two = (arrays(path / "checkpoints" / f"step_{step}") for path in (run, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.tobytes() == two[name].tobytes(), name


def wait_for_step(
    run: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 120
) -> None:
    """Returns when the metrics have that step's line."""
    path, until = run / "metrics.jsonl", time.monotonic() + timeout_s
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"step {step} did not come"
        time.sleep(0.005)


def one_line(err: str) -> str:
    """What a failed command said: one line, without a traceback."""
    said = err.strip().splitlines()
    assert len(said) == 1, err
    assert said[0].startswith("meshlm: ")
    return said[0].removeprefix("meshlm: ")
