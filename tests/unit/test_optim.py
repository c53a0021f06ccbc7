"""The optimizer against float64 numpy: schedule, AdamW, clipping, decay on matrices only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.core.errors import UsageError
from meshlm.core.tree import count_elements, to_named
from meshlm.model.params import Weight, weight_tree
from meshlm.optim import (
    OptimizerConfig,
    apply_updates,
    gradient_norm,
    learning_rate,
    make_optimizer,
)
from tiny import CONFIG, OPTIMIZER, assert_trees_close, draw_params

GPTJ = OptimizerConfig(
    learning_rate=1.2e-4, end_learning_rate=1.2e-5, warmup_steps=3_000, anneal_steps=300_000
)


def schedule(peak, end, warmup, anneal, step):
    """The original's, as published: warmup_pct peak - (peak - end)(1 - cos(pi anneal_pct)) / 2."""
    warmup_pct = np.clip(step, 0, warmup) / warmup if warmup else 1.0
    anneal_pct = np.clip(step - warmup, 0, anneal) / anneal
    return warmup_pct * peak - (peak - end) * (1 - np.cos(np.pi * anneal_pct)) / 2


rate_of = jax.jit(learning_rate, static_argnums=0)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 4e-8),
        (1_500, 6e-5),
        (3_000, 1.2e-4),
        (153_000, 6.6e-5),  # half the anneal: the middle of both ends
        (303_000, 1.2e-5),
        (383_500, 1.2e-5),  # the released step: flat since step 303,000
    ],
)
def test_gpt_js_schedule_by_hand(step, rate):
    assert float(rate_of(GPTJ, step)) == pytest.approx(rate, rel=1e-5, abs=1e-12)


@settings(max_examples=6)
@given(
    peak=st.sampled_from([1e-4, 3e-3, 1.0]),
    fraction=st.sampled_from([0.0, 0.1, 1.0]),
    warmup=st.sampled_from([0, 1, 7, 3000]),
    anneal=st.sampled_from([1, 10, 300_000]),
)
def test_the_schedule_is_the_originals(peak, fraction, warmup, anneal):
    config = OptimizerConfig(
        learning_rate=peak,
        end_learning_rate=fraction * peak,
        warmup_steps=warmup,
        anneal_steps=anneal,
    )
    steps = np.unique(np.geomspace(1, 2 * (warmup + anneal), 60).astype(int) - 1)
    found = jax.vmap(lambda step: learning_rate(config, step))(jnp.asarray(steps))
    wanted = [schedule(peak, fraction * peak, warmup, anneal, step) for step in steps]
    # Half a unit in the last place of the cosine, as the rate nears its end.
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-7 * peak)


def test_no_anneal_falls_at_once():
    config = dataclasses.replace(GPTJ, warmup_steps=2, anneal_steps=0)
    rates = [float(rate_of(config, step)) for step in range(5)]
    np.testing.assert_allclose(rates, [0, 6e-5, 1.2e-4, 1.2e-5, 1.2e-5], rtol=1e-5)


def adamw(params, gradients, config, decayed):
    """AdamW in float64: the parameters after each step of `gradients`."""
    params = {name: np.float64(value) for name, value in params.items()}
    m = {name: 0 * value for name, value in params.items()}
    v = {name: 0 * value for name, value in params.items()}
    b1, b2 = config.adam_b1, config.adam_b2
    for step, grads in enumerate(gradients):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
        scale = min(1.0, config.clip_norm / norm) if norm else 1.0
        rate = schedule(
            config.learning_rate,
            config.end_learning_rate,
            config.warmup_steps,
            config.anneal_steps,
            step,
        )
        for name, grad in grads.items():
            g = np.float64(grad) * scale
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat, v_hat = m[name] / (1 - b1 ** (step + 1)), v[name] / (1 - b2 ** (step + 1))
            update = m_hat / (np.sqrt(v_hat) + config.adam_epsilon)
            if name in decayed:
                update = update + config.weight_decay * params[name]
            params[name] = params[name] - rate * update
    return params


def declare(*, decay: bool = False, shared: bool = False, normed_last: bool = False) -> Weight:
    return Weight(
        shape=(),
        dims=(),
        decay=decay,
        shared=shared,
        normed_last=normed_last,
        uses=frozenset(),
        draw_name="",
    )


def run(params, gradients, config, weights):
    optimizer = make_optimizer(config, weights)

    @jax.jit
    def step(params, state, grads, number):
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates, learning_rate(config, number)), state

    state = optimizer.init(params)
    for number, grads in enumerate(gradients):
        params, state = step(params, state, grads, number)
    return params


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip_norm": 1e9},
        {"weight_decay": 0.0},
        {"adam_b1": 0.5, "adam_b2": 0.95, "adam_epsilon": 1e-2},
        {"warmup_steps": 0},
    ],
    ids=str,
)
def test_ten_steps_of_adamw(change):
    config = dataclasses.replace(OPTIMIZER, **change)
    rng = np.random.default_rng(0)
    shapes = {"matrix": (5, 7), "bias": (7,), "stacked_bias": (2, 7)}
    params = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    # Norms from 0.01 to 100: some are clipped and some are not.
    gradients = [
        {
            n: (10.0 ** rng.uniform(-3, 1) * rng.standard_normal(s)).astype(np.float32)
            for n, s in shapes.items()
        }
        for _ in range(10)
    ]
    weights = {name: declare(decay=name == "matrix") for name in params}
    found = run(params, gradients, config, weights)
    assert_trees_close(found, adamw(params, gradients, config, {"matrix"}), 1e-6)


def test_a_bias_in_shares_is_what_each_share_comes_to():
    """The original's own way: every shard has a share, its own moments, and the whole gradient."""
    shards = 4
    config = dataclasses.replace(OPTIMIZER, bias_shares=shards)
    rng = np.random.default_rng(1)
    matrix, whole = rng.standard_normal((5, 7)), rng.standard_normal(7)
    shares = {f"share_{i}": share for i, share in enumerate(np.outer([0.4, 0.3, 0.2, 0.1], whole))}
    gradients = [
        {"matrix": rng.standard_normal((5, 7)), "bias": rng.standard_normal(7)} for _ in range(10)
    ]
    of_shares = [{"matrix": g["matrix"], **dict.fromkeys(shares, g["bias"])} for g in gradients]
    wanted = adamw({"matrix": matrix, **shares}, of_shares, config, {"matrix"})

    weights = {"matrix": declare(decay=True), "bias": declare(shared=True)}
    optimizer = make_optimizer(config, weights)
    params = {"matrix": jnp.float32(matrix), "bias": jnp.float32(whole)}
    state = optimizer.init(params)
    for number, grads in enumerate(gradients):
        grads = jax.tree.map(jnp.float32, grads)
        updates, state = optimizer.update(grads, state, params)
        params = apply_updates(params, updates, learning_rate(config, number))
    summed = {"matrix": wanted["matrix"], "bias": sum(wanted[name] for name in shares)}
    assert_trees_close(params, summed, 1e-6)


def test_the_norm_counts_a_bias_once_a_share():
    grads = {"matrix": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 3.0)}
    shared = {"matrix": declare(), "bias": declare(shared=True)}
    config = dataclasses.replace(OPTIMIZER, bias_shares=5)
    assert float(gradient_norm(config, grads, shared)) == pytest.approx(np.sqrt(24 + 5 * 27))
    assert float(gradient_norm(OPTIMIZER, grads, shared)) == pytest.approx(np.sqrt(24 + 27))


def test_the_norm_adds_in_the_order_of_format_1():
    """Ones that are added to 2^24 one by one are lost; added up before, they count."""
    grads = {"bias": jnp.float32(4096), **{f"m{i}": jnp.float32(1) for i in range(8)}}
    for last, wanted in ((True, np.sqrt(2.0**24 + 8)), (False, 4096.0)):
        weights = {name: declare(normed_last=last and name == "bias") for name in grads}
        assert float(gradient_norm(OPTIMIZER, grads, weights)) == float(np.float32(wanted))


def test_without_a_gradient_only_the_matrices_shrink():
    params = draw_params(CONFIG)
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = dataclasses.replace(OPTIMIZER, warmup_steps=0, weight_decay=0.5)
    after = to_named(run(params, [zeros], config, weight_tree(CONFIG)))
    for name, before in to_named(params).items():
        is_matrix = not any(word in name for word in ("norm", "bias"))
        factor = 1 - 1e-2 * 0.5 if is_matrix else 1.0
        np.testing.assert_allclose(after[name], factor * np.asarray(before), rtol=1e-6)


def test_clipping_scales_all_tensors_by_one_factor():
    grads = {"a": jnp.full((9,), 3.0), "b": jnp.full((16,), 1.0)}  # norm sqrt(81 + 16)
    optimizer = make_optimizer(
        dataclasses.replace(OPTIMIZER, clip_norm=0.5),
        {"a": declare(decay=True), "b": declare(decay=True)},
    )
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    # Adam's first moment after a step is a tenth of what it was given.
    first = jax.tree.map(lambda m: 10 * m, state["adam"].mu)
    np.testing.assert_allclose(first["a"], 3 * 0.5 / np.sqrt(97), rtol=1e-5)
    np.testing.assert_allclose(first["b"], 1 * 0.5 / np.sqrt(97), rtol=1e-5)


def test_the_optimizers_state_has_names_for_checkpoints():
    params = draw_params(CONFIG)
    state = make_optimizer(OPTIMIZER, weight_tree(CONFIG)).init(params)
    names = list(to_named(state))
    assert "adam.count" in names
    assert "adam.mu.blocks.attention.query.weight" in names
    assert "adam.nu.embedding.tokens" in names
    assert len(names) == 1 + 2 * 15


def adafactor(params, gradients, config, factored):
    """Adafactor in float64 after its paper: the parameters after each step of `gradients`."""
    params = {name: np.float64(value) for name, value in params.items()}
    rows, columns, squares = {}, {}, {}
    for step, grads in enumerate(gradients):
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
        kept = 1 - (step + 1.0) ** -0.8
        for name, grad in grads.items():
            g = np.float64(grad) * min(1.0, config.clip_norm / norm)
            if name in factored:
                rows[name] = kept * rows.get(name, 0) + (1 - kept) * (g**2).sum(-1)
                columns[name] = kept * columns.get(name, 0) + (1 - kept) * (g**2).sum(-2)
                whole = rows[name].sum(-1)[..., None, None]
                v = rows[name][..., :, None] * columns[name][..., None, :] / whole
            else:
                v = squares[name] = kept * squares.get(name, 0) + (1 - kept) * g**2
            update = g / np.sqrt(v)
            update = update / max(1.0, np.sqrt((update**2).mean()))
            rate = schedule(
                config.learning_rate,
                config.end_learning_rate,
                config.warmup_steps,
                config.anneal_steps,
                step,
            )
            if params[name].ndim > 1:
                update = update + config.weight_decay * params[name]
            params[name] = params[name] - rate * update
    return params


@pytest.mark.parametrize("clip_norm", [1.0, 1e9])
def test_ten_steps_of_adafactor(clip_norm):
    config = dataclasses.replace(OPTIMIZER, name="adafactor", clip_norm=clip_norm, warmup_steps=0)
    rng = np.random.default_rng(0)
    # Factored, one matrix and a stack of them; a side of 127 is too short for it.
    shapes = {"wide": (128, 130), "stack": (2, 140, 128), "narrow": (127, 200), "bias": (150,)}
    params = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    gradients = [
        {
            n: (10.0 ** rng.uniform(-4, 0, (*s[:-1], 1)) * rng.standard_normal(s)).astype("f4")
            for n, s in shapes.items()
        }
        for _ in range(10)
    ]
    weights = {name: declare(decay=len(shape) > 1) for name, shape in shapes.items()}
    found = run(params, gradients, config, weights)
    assert_trees_close(found, adafactor(params, gradients, config, {"wide", "stack"}), 1e-6)


def test_adafactor_keeps_little():
    large = {"matrix": jax.ShapeDtypeStruct((24, 4096, 1024), jnp.float32)}
    weights = {"matrix": declare(decay=True)}
    config = dataclasses.replace(OPTIMIZER, name="adafactor")
    state = jax.eval_shape(make_optimizer(config, weights).init, large)
    names = to_named(state)
    assert "adafactor.v_row.matrix" in names
    assert "adafactor.v_col.matrix" in names
    assert count_elements(state) < 24 * (4096 + 1024) + 10
    with pytest.raises(UsageError, match="bias_shares is 2: give 1 with adafactor"):
        dataclasses.replace(config, bias_shares=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-4),
        ("end_learning_rate", -1.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("adam_epsilon", 0.0),
        ("warmup_steps", -1),
        ("anneal_steps", -1),
        ("adam_b1", 1.0),
        ("adam_b2", -0.1),
        ("learning_rate", float("nan")),
    ],
)
def test_a_nonsense_knob_is_refused(name, value):
    with pytest.raises(UsageError, match=rf"^{name} is {value}: give "):
        dataclasses.replace(GPTJ, **{name: value})
