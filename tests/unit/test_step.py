"""A training step: accumulation, what is measured, and what a bad batch cannot do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import gptj_float64
from meshlm.core.tree import to_named
from meshlm.optim import learning_rate
from meshlm.step import (
    SPIKE_WINDOW,
    StepBatch,
    abstract_state,
    compile_train_step,
    eval_step,
    init_state,
    is_spike,
    loss_and_grads,
)
from tiny import (
    CONFIG,
    OPTIMIZER,
    assert_trees_close,
    assert_trees_identical,
    draw_batch,
    draw_params,
    mesh_of,
    step_config,
)

AT_ONCE = dataclasses.replace(OPTIMIZER, warmup_steps=0)
BATCH = draw_batch(CONFIG, 4, 8)
PARAMS = draw_params(CONFIG)


@functools.cache
def train_step(config):
    return compile_train_step(config)


@functools.cache
def measure(config):
    return jax.jit(lambda params, batch: loss_and_grads(params, batch, config))


@functools.cache
def compiled_init(config):
    return jax.jit(lambda seed: init_state(config, seed))


def fresh_state(config):
    """The initial state with every parameter drawn; its own memory, for a step takes it."""
    state = jax.eval_shape(lambda: init_state(config, 0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    return dataclasses.replace(state, params=jax.tree.map(jnp.array, PARAMS))


def host(tree):
    return {name: np.array(value) for name, value in to_named(tree).items()}


def rows(batch: StepBatch, chosen) -> StepBatch:
    return jax.tree.map(lambda x: x[chosen], batch)


def float64_losses(batch: StepBatch):
    logits = gptj_float64.forward(PARAMS, CONFIG, batch.tokens, batch.segment_ids)
    return gptj_float64.token_loss(logits, batch.targets)


# The loss.


@pytest.mark.parametrize(
    ("accumulate", "z_loss", "segments"), [(1, 0.0, False), (1, 0.3, True), (2, 0.3, False)]
)
def test_the_loss_is_the_mean_over_the_tokens_that_count(accumulate, z_loss, segments):
    batch = draw_batch(CONFIG, 4, 8, segments=segments)
    mask = np.random.default_rng(1).integers(0, 2, (4, 8)).astype(np.float32)
    batch = dataclasses.replace(batch, loss_mask=jnp.asarray(mask))
    loss, _, _ = measure(step_config(accumulate=accumulate, z_loss=z_loss))(PARAMS, batch)
    nll, z = float64_losses(batch)
    assert float(loss) == pytest.approx(((nll + z_loss * z) * mask).sum() / mask.sum(), rel=2e-6)


def test_evaluation_sums_the_plain_loss():
    mask = np.ones((4, 8), np.float32)
    mask[1, 3:] = 0
    batch = dataclasses.replace(BATCH, loss_mask=jnp.asarray(mask))
    config = step_config(z_loss=0.3, accumulate=2)
    sums = jax.jit(lambda p, b: eval_step(p, b, config))(PARAMS, batch)
    nll, _ = float64_losses(batch)
    assert float(sums.nll) == pytest.approx((nll * mask).sum(), rel=2e-6)
    assert float(sums.tokens) == 27


# Accumulation.


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_one_big_batch(accumulate):
    # Uneven counts of tokens in the parts: the mean is over the batch, not over the parts' means.
    mask = np.ones((4, 8), np.float32)
    mask[0] = 0
    mask[1, 2:] = 0
    batch = dataclasses.replace(BATCH, loss_mask=jnp.asarray(mask))
    whole_loss, whole_grads, _ = measure(step_config())(PARAMS, batch)
    loss, grads, _ = measure(step_config(accumulate=accumulate))(PARAMS, batch)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
    assert_trees_close(grads, whole_grads, 2e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_mean_square_of_the_parts_gradients(accumulate):
    _, _, found = measure(step_config(accumulate=accumulate))(PARAMS, BATCH)
    squares = []
    for part in range(accumulate):
        _, grads, _ = measure(step_config())(PARAMS, rows(BATCH, slice(part, None, accumulate)))
        squares.append(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert float(found) == pytest.approx(np.mean(squares), rel=1e-5)


# The step.


def test_a_step_is_the_gradient_put_through_the_optimizer():
    config = step_config(optimizer=AT_ONCE)
    loss, grads, _ = measure(config)(PARAMS, BATCH)
    state, metrics = train_step(config)(fresh_state(config), BATCH)
    assert float(metrics.loss) == float(loss)
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-6)  # before clipping
    assert norm > config.optimizer.clip_norm
    assert float(metrics.learning_rate) == pytest.approx(1e-2)
    reference = optax.adamw(1e-2, 0.9, 0.999, 1e-8, weight_decay=0.1, mask=lambda p: is_matrix(p))

    @jax.jit
    def stepped(params, grads):
        clipped = jax.tree.map(lambda g: g / norm, grads)
        updates, _ = reference.update(clipped, reference.init(params), params)
        return optax.apply_updates(params, updates)

    assert_trees_close(state.params, stepped(PARAMS, grads), 1e-6)


def is_matrix(params):
    flags = {n: not any(word in n for word in ("norm", "bias")) for n in to_named(params)}
    return jax.tree.unflatten(jax.tree.structure(params), list(flags.values()))


def test_the_rate_follows_the_step_and_the_loss_falls():
    config = step_config(accumulate=2)
    state, losses = fresh_state(config), []
    for number in range(12):
        state, metrics = train_step(config)(state, BATCH)
        rate = float(learning_rate(config.optimizer, number))
        assert float(metrics.learning_rate) == pytest.approx(rate, rel=1e-6)
        losses.append(float(metrics.loss))
    assert int(state.step) == 12
    # The first update is at rate 0.
    assert losses[1] == losses[0]
    assert losses[-1] < losses[0] - 0.5


def nan_in_the_mask(batch):
    return dataclasses.replace(batch, loss_mask=batch.loss_mask.at[2, 3].set(jnp.nan))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_changes_nothing(accumulate):
    config = step_config(accumulate=accumulate, optimizer=AT_ONCE)
    step = train_step(config)
    state, _ = step(fresh_state(config), BATCH)
    before = host(state)
    for times in (1, 2):
        state, metrics = step(state, nan_in_the_mask(BATCH))
        assert not np.isfinite(metrics.loss)
        assert int(metrics.skipped) == int(metrics.skipped_in_a_row) == times
    after = host(state)
    changed = {name for name in before if after[name].tobytes() != before[name].tobytes()}
    assert changed == {"step", "skipped", "skipped_in_a_row"}
    assert int(state.step) == 3
    # A good batch goes on, as if the bad ones had not been, but for the step's number.
    state, metrics = step(state, BATCH)
    assert np.isfinite(metrics.loss)
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (2, 0)
    assert int(state.optimizer["adam"].count) == 2
    assert host(state)["params.head.weight"].tobytes() != before["params.head.weight"].tobytes()


def filled(losses) -> jax.Array:
    """A window of losses that begins with these."""
    window = np.full(SPIKE_WINDOW, np.inf, np.float32)
    window[: len(losses)] = losses
    return jnp.asarray(window)


@pytest.mark.parametrize(
    ("count", "shift", "is_skipped"),
    [(64, -3.0, True), (63, -3.0, False), (128, -3.0, True), (128, -0.01, False), (128, 3, False)],
)
def test_a_loss_far_above_the_last_ones_changes_nothing(count, shift, is_skipped):
    """Once there are half of a window of them."""
    config = step_config(optimizer=AT_ONCE, skip_spikes=6.0)
    state = fresh_state(config)
    loss = float(measure(config)(state.params, BATCH)[0])
    level = loss + shift + np.random.default_rng(0).normal(0, 0.1, count)
    state = dataclasses.replace(state, recent_losses=filled(level), step=jnp.int32(130))
    before = host(state)
    state, metrics = train_step(config)(state, BATCH)
    assert int(metrics.skipped) == is_skipped
    after = host(state)
    kept = after["params.head.weight"].tobytes() == before["params.head.weight"].tobytes()
    assert kept == is_skipped
    wanted = before["recent_losses"]
    wanted[130 % SPIKE_WINDOW] = metrics.loss
    np.testing.assert_array_equal(after["recent_losses"], wanted)


def test_a_step_is_compiled_once():
    """Else the state that it returns has another type than the one that it begins with."""
    config = step_config(optimizer=AT_ONCE, skip_spikes=6.0)
    state, step = compiled_init(config)(0), compile_train_step(config)
    for _ in range(3):
        state, _ = step(state, BATCH)
    assert step._cache_size() == 1


@given(
    losses=st.lists(st.floats(-100, 100, width=32) | st.just(np.inf), min_size=128, max_size=128),
    loss=st.floats(-200, 200, width=32),
    sigmas=st.floats(0.5, 8),
)
def test_what_is_a_spike(losses, loss, sigmas):
    known = np.array([x for x in losses if np.isfinite(x)], np.float64)
    limit = known.mean() + sigmas * known.std() if len(known) else np.inf
    assume(abs(loss - limit) > 1e-3)
    found = is_spike(jnp.float32(loss), jnp.asarray(losses, jnp.float32), sigmas)
    assert bool(found) == (len(known) >= 64 and loss > limit)


def test_a_gradient_that_overflows_changes_nothing_though_the_loss_is_finite():
    config = step_config(optimizer=AT_ONCE)
    state = fresh_state(config)
    large = dataclasses.replace(state.params.head, weight=1e25 * state.params.head.weight)
    huge = dataclasses.replace(state.params, head=large)
    state = dataclasses.replace(state, params=huge)
    before = host(state)
    state, metrics = train_step(config)(state, BATCH)
    assert np.isfinite(metrics.loss)
    assert not np.isfinite(metrics.grad_norm)
    assert int(metrics.skipped) == 1
    after = host(state)
    for name in before:
        if name.startswith(("params", "optimizer")):
            assert after[name].tobytes() == before[name].tobytes(), name


# Memory and placing.


def test_a_step_takes_the_old_states_memory():
    config = step_config(optimizer=AT_ONCE)
    # As drawn: no two counters may share a buffer that is then given away twice.
    state = compiled_init(config)(0)
    first = to_named(state)
    state, _ = train_step(config)(state, BATCH)
    assert all(x.is_deleted() for x in first.values())
    train_step(config)(state, BATCH)
    assert not any(x.is_deleted() for x in jax.tree.leaves(BATCH))


def test_the_abstract_state_is_what_init_makes():
    config, mesh = step_config(), mesh_of(1, 2, 2)
    shapes = to_named(abstract_state(config, mesh))
    with jax.set_mesh(mesh):
        state = to_named(jax.jit(lambda: init_state(config, 0))())
    assert shapes.keys() == state.keys()
    for name, x in state.items():
        assert (shapes[name].shape, shapes[name].dtype) == (x.shape, x.dtype), name
        assert shapes[name].sharding.is_equivalent_to(x.sharding, x.ndim), name
        # Adam's moments lie where their weights do.
        weight = name.removeprefix("optimizer.adam.mu.").removeprefix("optimizer.adam.nu.")
        if weight != name:
            assert x.sharding.is_equivalent_to(state[f"params.{weight}"].sharding, x.ndim), name


def test_the_initial_state():
    config = step_config()
    first, again, other = (compiled_init(config)(seed) for seed in (1, 1, 2))
    assert_trees_identical(first, again)
    assert (np.asarray(first.params.head.weight) != np.asarray(other.params.head.weight)).any()
    assert int(first.step) == int(first.skipped) == int(first.skipped_in_a_row) == 0
    moments = (first.optimizer["adam"].mu, first.optimizer["adam"].nu)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(moments))
