"""Any mesh of eight virtual devices trains as one device does."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from meshlm.core.sharding import RULES, use_mesh
from meshlm.ops import loss as loss_room
from meshlm.step import (
    SPIKE_WINDOW,
    StepBatch,
    StepMetrics,
    TrainState,
    abstract_state,
    compile_train_step,
    eval_step,
    loss_and_grads,
)
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

# replica x data x model; 1 x 1 x 1 is what the others are held against, inside of a mesh as well.
MESHES = [(1, 1, 1), (1, 8, 1), (8, 1, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2)]
OPTIMIZER_AT_ONCE = dataclasses.replace(OPTIMIZER, warmup_steps=0)
PLAIN = step_config(DIVISIBLE, z_loss=1e-2, optimizer=OPTIMIZER_AT_ONCE)
# Accumulation, documents, recomputation and the judging of spikes together.
FULL = dataclasses.replace(
    PLAIN,
    accumulate=2,
    skip_spikes=6.0,
    compute=dataclasses.replace(PLAIN.compute, remat="full"),
)
STEPS = 3
SQUARE = StepMetrics._fields.index("micro_grad_square")


def batches(*, segments: bool) -> list[StepBatch]:
    drawn = [draw_batch(DIVISIBLE, 16, 12, seed, segments=segments) for seed in range(STEPS)]
    mask = np.ones((16, 12), np.float32)
    mask[3] = 0
    mask[5, 7:] = 0
    return [dataclasses.replace(batch, loss_mask=mask) for batch in drawn]


def start_state(config, mesh) -> TrainState:
    """Drawn parameters and zero moments, placed by the rules."""
    shapes = abstract_state(config, mesh)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    none_yet = None if config.skip_spikes is None else np.full(SPIKE_WINDOW, np.inf, np.float32)
    state = dataclasses.replace(state, params=draw_params(DIVISIBLE), recent_losses=none_yet)
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), state, shapes)


@functools.cache
def measure(sizes, rules="fsdp-tensor", config=PLAIN):
    """Evaluation's sums, loss and gradients of one batch, nothing else in play."""
    mesh = mesh_of(*sizes)

    @jax.jit
    def sums_and_grads(params, batch):
        loss, grads, square = loss_and_grads(params, batch, config)
        return (loss, square, *eval_step(params, batch, config)), grads

    with use_mesh(mesh, RULES[rules]):
        batch = batch_on_mesh(mesh, batches(segments=False)[0])
        return sums_and_grads(start_state(config, mesh).params, batch)


@functools.cache
def train(sizes):
    """Metrics of each step, Adam's first moments after the first, and the last state."""
    mesh, measured, first = mesh_of(*sizes), [], None
    with jax.set_mesh(mesh):
        state, step = start_state(FULL, mesh), compile_train_step(FULL)
        for batch in batches(segments=True):
            state, metrics = step(state, batch_on_mesh(mesh, batch))
            measured.append(metrics)
            first = first or jax.tree.map(np.array, state.optimizer["adam"].mu)
    return np.array(measured), first, state


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(sizes):
    (scalars, grads), (wanted_scalars, wanted_grads) = measure(sizes), measure((1, 1, 1))
    np.testing.assert_allclose(scalars, wanted_scalars, rtol=1e-5)
    assert_trees_close(grads, wanted_grads, 1e-5)


@pytest.mark.parametrize("rules", [name for name in RULES if name != "fsdp-tensor"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2)], ids=str)
def test_every_rule_gives_the_loss_and_gradients_of_one_device(sizes, rules):
    (scalars, grads), (wanted_scalars, wanted_grads) = measure(sizes, rules), measure((1, 1, 1))
    np.testing.assert_allclose(scalars, wanted_scalars, rtol=1e-5)
    assert_trees_close(grads, wanted_grads, 1e-5)


@pytest.mark.parametrize(("sizes", "rules"), [((2, 2, 2), name) for name in RULES], ids=str)
def test_copies_of_the_weights_add_their_accumulated_gradients(sizes, rules, monkeypatch):
    """Each of the copies sums up its own, in stretches of the loss as well."""
    monkeypatch.setattr(loss_room, "STRETCH_ROWS", 2)
    (scalars, grads), (wanted_scalars, wanted_grads) = (
        measure(sizes, rules, FULL),
        measure((1, 1, 1)),
    )
    np.testing.assert_allclose(scalars[0], wanted_scalars[0], rtol=1e-5)
    assert_trees_close(grads, wanted_grads, 1e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_trains_as_one_device(sizes):
    (measured, first, state), (wanted, wanted_first, wanted_state) = train(sizes), train((1, 1, 1))
    # Losses; norms of gradients lose more to three steps of Adam, which magnifies small gradients.
    np.testing.assert_allclose(measured[:, 0], wanted[:, 0], rtol=1e-5)
    # What each copy of the weights measures of its own rows is noise of its own kind.
    same = [column for column in range(measured.shape[1]) if column != SQUARE or sizes[0] == 1]
    np.testing.assert_allclose(measured[:, same], wanted[:, same], rtol=1e-4)
    assert len(set(wanted[:, 0])) == STEPS
    # A tenth of the first, accumulated and clipped gradient.
    assert_trees_close(first, wanted_first, 1e-5)
    assert_trees_close(state.params, wanted_state.params, 1e-4)
    # Parameters and moments stay in their shards.
    shapes = abstract_state(FULL, mesh_of(*sizes))
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert x.sharding.is_equivalent_to(shape.sharding, x.ndim)


def test_a_mesh_of_one_device_is_no_mesh():
    """The step without any mesh entered: the specs are None then, another way through the code."""
    state = jax.tree.map(lambda x: np.asarray(x), start_state(PLAIN, mesh_of()))
    batch = batches(segments=False)[0]
    loss, grads, _ = jax.jit(lambda p, b: loss_and_grads(p, b, PLAIN))(state.params, batch)
    wanted_scalars, wanted_grads = measure((1, 1, 1))
    assert float(loss) == pytest.approx(float(wanted_scalars[0]), rel=1e-6)
    assert_trees_close(grads, wanted_grads, 1e-6)


def test_bfloat16_on_a_mesh():
    compute = dataclasses.replace(PLAIN.compute, dtype="bfloat16", remat="minimal")
    config = dataclasses.replace(PLAIN, compute=compute)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        state = start_state(config, mesh)
        batch = batch_on_mesh(mesh, batches(segments=False)[0])
        loss, grads, _ = jax.jit(lambda p, b: loss_and_grads(p, b, config))(state.params, batch)
    wanted_scalars, wanted_grads = measure((1, 1, 1))
    assert float(loss) == pytest.approx(float(wanted_scalars[0]), rel=1e-2)
    assert_trees_close(grads, wanted_grads, 5e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (2, 2, 2)])
def test_gradients_summed_in_bfloat16(sizes, accumulate, monkeypatch):
    """The loss is the same, the gradients are so up to the rounding of what each device adds."""
    monkeypatch.setattr(loss_room, "STRETCH_ROWS", 2)
    mesh, found = mesh_of(*sizes), {}
    for reduce_dtype in ("float32", "bfloat16"):
        compute = dataclasses.replace(
            PLAIN.compute, dtype="bfloat16", remat="full", reduce_dtype=reduce_dtype
        )
        config = dataclasses.replace(PLAIN, compute=compute, accumulate=accumulate)
        with jax.set_mesh(mesh):
            state = start_state(config, mesh)
            batch = batch_on_mesh(mesh, batches(segments=False)[0])
            step = jax.jit(lambda p, b, config=config: loss_and_grads(p, b, config))
            found[reduce_dtype] = step(state.params, batch)
    (loss, grads, _), (wanted_loss, wanted_grads, _) = found["bfloat16"], found["float32"]
    assert float(loss) == float(wanted_loss)
    assert_trees_close(grads, wanted_grads, 2**-6)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
