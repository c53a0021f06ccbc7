"""Adafactor on any mesh, by any rules: its rows and columns are sums over shards."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from meshlm.core.sharding import RULES, use_mesh
from meshlm.core.tree import to_named
from meshlm.step import StepConfig, TrainState, abstract_state, compile_train_step
from tiny import (
    DIVISIBLE,
    OPTIMIZER,
    assert_trees_close,
    batch_on_mesh,
    draw_batch,
    draw_params,
    mesh_of,
    step_config,
)

# Wide enough that the feed-forward, the embedding and the head are kept by rows and columns.
WIDE = dataclasses.replace(DIVISIBLE, d_model=128, head_dim=16, d_ff=256, vocab_size=192)
CONFIG = step_config(
    WIDE, optimizer=dataclasses.replace(OPTIMIZER, name="adafactor", warmup_steps=0)
)
STEPS = 2


def start_state(config: StepConfig, shapes: TrainState) -> TrainState:
    with jax.set_mesh(mesh_of()):
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = dataclasses.replace(zeros, params=draw_params(config.model, scale=0.1))
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), state, shapes)


def train(rules: str, sizes: tuple[int, int, int]) -> tuple[list[float], TrainState]:
    mesh = mesh_of(*sizes)
    with use_mesh(mesh, RULES[rules]):
        shapes = abstract_state(CONFIG, mesh)
        state, step, losses = start_state(CONFIG, shapes), compile_train_step(CONFIG), []
        for seed in range(STEPS):
            batch = batch_on_mesh(mesh, draw_batch(WIDE, 16, 12, seed))
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        for (name, x), shape in zip(to_named(state).items(), jax.tree.leaves(shapes), strict=True):
            assert x.sharding.is_equivalent_to(shape.sharding, x.ndim), name
    return losses, state


@pytest.fixture(scope="module")
def one_device() -> tuple[list[float], TrainState]:
    return train("data", (1, 1, 1))


@pytest.mark.parametrize(
    ("rules", "sizes"),
    [
        ("data", (1, 8, 1)),
        ("fsdp", (1, 4, 2)),
        ("fsdp-tensor", (2, 2, 2)),
        ("tensor", (1, 1, 8)),
        ("replica-fsdp", (2, 4, 1)),
    ],
)
def test_a_mesh_trains_as_one_device(one_device, rules, sizes):
    (losses, state), (wanted_losses, wanted) = train(rules, sizes), one_device
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert wanted_losses[0] != wanted_losses[1]
    # The first update is of the size of the learning rate however small its gradient, and so
    # magnifies the rounding of the smallest.
    assert_trees_close(state.params, wanted.params, 1e-3)
    factored = {n: x for n, x in to_named(wanted.optimizer).items() if x.size > 1}
    assert "adafactor.v_row.blocks.feed_forward.up.weight" in factored
    found = to_named(state.optimizer)
    assert_trees_close({name: found[name] for name in factored}, factored, 1e-4)
