"""`--recipe mtj-2021` against the recorded training curve, and what it would be without it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from meshlm.model.transformer import Compute
from meshlm.step import StepConfig, train_step

pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "fixtures" / "mtj" / "dev_train_s2"
STEPS = 8


@pytest.fixture(scope="module")
def replay():
    spec = importlib.util.spec_from_file_location("replay_mtj", ROOT / "bench" / "replay_mtj.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "replay_mtj", module)
        spec.loader.exec_module(module)
    return module


def deviations(replay, kind: str = "f32", **changes) -> tuple[np.ndarray, np.ndarray]:
    """Of loss and norm, step by step, without the original's casts or with them."""
    recording = replay.Recording.read(FOLDER)
    model = replay.open_source(FOLDER / "full" / "step_0").model
    config = StepConfig(
        model=model,
        optimizer=dataclasses.replace(recording.optimizer, **changes),
        compute=Compute(dtype="float32"),
        accumulate=recording.accumulate,
        z_loss=1e-4,
        weight_dtype="bfloat16" if kind == "mtj" else "float32",
    )
    step = jax.jit(lambda state, batch: train_step(state, batch, config))
    state = replay.load_state(recording, 0, config)
    found = []
    for number in range(STEPS):
        state, metrics = step(state, recording.batch(number))
        found.append((metrics.loss, metrics.grad_norm * recording.accumulate))
    losses, norms = np.array(found, np.float64).T
    golden = recording.golden
    return (
        np.abs(losses / golden[f"train_loss_{kind}"][:STEPS] - 1),
        np.abs(norms / golden[f"grad_norm_{kind}"][:STEPS] - 1),
    )


def test_the_recorded_curve(replay):
    loss, norm = deviations(replay)
    assert loss.max() <= 1e-4
    assert norm.max() <= 1e-4


def test_the_recorded_curve_in_bfloat16(replay):
    """As the original trained; all its steps are in `test_originals.py`."""
    loss, norm = deviations(replay, "mtj")
    assert loss.max() <= 5e-4
    assert norm.max() <= 3e-2
    # Before an update has been rounded the losses are the same.
    assert loss[0] <= 1e-6


def test_biases_that_are_one_parameter_give_another_run(replay):
    """What any other program does: one bias, counted once and moved once."""
    loss, norm = deviations(replay, bias_shares=1)
    assert norm[0] > 1e-4
    assert loss[2:].max() > 1e-4
