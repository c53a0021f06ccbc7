"""The forward pass: against float64 numpy, causality by gradient, and every way to compute it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.model.families import gpt_j
from meshlm.model.params import Embedding
from meshlm.model.transformer import Compute, forward, hidden_states, unembed
from meshlm.step import loss_and_grads
from tiny import (
    CONFIG,
    F32,
    assert_trees_close,
    draw_batch,
    draw_params,
    draw_tokens,
    relative_l2,
    relative_max,
    step_config,
)

PARAMS = draw_params(CONFIG)
SEGMENTS = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 2]] * 2, jnp.int32)


def logits_of(config, params, tokens, compute=F32, segments=None):
    return jax.jit(lambda p, t, s: forward(p, config, t, compute, s))(params, tokens, segments)


@settings(max_examples=6)
@given(
    layers=st.integers(1, 3),
    d_model=st.integers(2, 17),
    heads=st.integers(1, 4),
    head_dim=st.integers(2, 7),
    half_rotary=st.integers(1, 3),
    d_ff=st.integers(1, 19),
    vocab=st.integers(2, 31),
    length=st.integers(1, 9),
)
def test_the_logits_of_any_shape(
    layers, d_model, heads, head_dim, half_rotary, d_ff, vocab, length
):
    config = gpt_j(
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        head_dim=head_dim,
        rotary_dim=min(2 * half_rotary, head_dim // 2 * 2),
        d_ff=d_ff,
        vocab_size=vocab,
        context_length=9,
    )
    params, tokens = draw_params(config), draw_tokens(config, 2, length)
    found = logits_of(config, params, tokens)
    assert found.dtype == jnp.float32
    assert relative_max(found, gptj_float64.forward(params, config, tokens)) < 1e-5


@pytest.mark.parametrize("change", [{"layer_norm_epsilon": 0.5}, {"rotary_base": 50.0}])
def test_every_field_of_the_config_counts(change):
    config, tokens = dataclasses.replace(CONFIG, **change), draw_tokens(CONFIG, 2, 8)
    found = logits_of(config, PARAMS, tokens)
    assert relative_max(found, gptj_float64.forward(PARAMS, config, tokens)) < 1e-5
    assert relative_max(found, gptj_float64.forward(PARAMS, CONFIG, tokens)) > 1e-3


def test_documents_of_one_window():
    tokens = draw_tokens(CONFIG, 2, 9)
    found = logits_of(CONFIG, PARAMS, tokens, segments=SEGMENTS)
    wanted = gptj_float64.forward(PARAMS, CONFIG, tokens, SEGMENTS)
    assert relative_max(found, wanted) < 1e-5
    assert relative_max(found, gptj_float64.forward(PARAMS, CONFIG, tokens)) > 1e-2


def test_a_packed_document_is_as_if_alone():
    # Positions run on over the window; rotary attention sees distances alone.
    tokens = draw_tokens(CONFIG, 2, 9)
    packed = logits_of(CONFIG, PARAMS, tokens, segments=SEGMENTS)
    for start, stop in [(0, 3), (3, 8), (8, 9)]:
        alone = gptj_float64.forward(PARAMS, CONFIG, tokens[:, start:stop])
        assert relative_max(packed[:, start:stop], alone) < 1e-5


# Causality.

SMALL = dataclasses.replace(
    CONFIG, d_model=8, num_heads=2, head_dim=4, rotary_dim=2, d_ff=8, vocab_size=8
)
WAYS = [
    Compute(dtype=dtype, remat=remat, scan_layers=scan)
    for dtype, remat, scan in [
        ("float32", "none", True),
        ("bfloat16", "full", True),
        ("bfloat16", "none", False),
    ]
]


@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1, 1, 2, 2]]])
@pytest.mark.parametrize("compute", WAYS, ids=str)
def test_the_gradient_shows_what_each_logit_depends_on(compute, segments):
    """d logits[t] / d embedding of token s is zero for s > t, and not zero for any s <= t.

    Each token of the window is another row of the table, so the table's gradient is by position.
    """
    length = 7
    params = draw_params(SMALL, seed=2, scale=0.5)
    tokens = jnp.asarray([[3, 0, 6, 1, 5, 2, 4]], jnp.int32)
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)

    @jax.jit
    def jacobian(table):
        with_table = dataclasses.replace(params, embedding=Embedding(tokens=table))
        return jax.jacrev(
            lambda p: forward(p, SMALL, tokens, compute, ids)[0].sum(-1)  # over V
        )(with_table).embedding.tokens

    weights = np.random.default_rng(0).standard_normal(SMALL.vocab_size)
    scaled = params.head.weight * weights[:, None].astype(np.float32)
    params = dataclasses.replace(params, head=dataclasses.replace(params.head, weight=scaled))
    by_row = np.asarray(jacobian(params.embedding.tokens), np.float64)[:, np.asarray(tokens)[0]]
    depends = np.abs(by_row).max(-1) > 0
    np.testing.assert_array_equal(depends, gptj_float64.causal(1, length, segments)[0])


# Every way to compute the same.


@pytest.fixture(scope="module")
def plain():
    """Loss and gradients in float32, one compiled layer, nothing computed again."""
    return value_and_grads(F32)


def value_and_grads(compute: Compute):
    config = step_config(compute=compute)
    batch = draw_batch(CONFIG, 2, 9)
    loss, grads, _ = jax.jit(lambda p, b: loss_and_grads(p, b, config))(PARAMS, batch)
    return loss, grads


@pytest.mark.parametrize(
    ("remat", "scan"),
    [("none", False), ("minimal", True), ("feed-forward", True), ("full", True), ("full", False)],
)
def test_remat_and_scan_change_no_number(plain, remat, scan):
    loss, grads = value_and_grads(Compute(dtype="float32", remat=remat, scan_layers=scan))
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-6)
    assert_trees_close(grads, plain[1], 5e-6)


def test_the_loss_is_that_of_float64(plain):
    batch = draw_batch(CONFIG, 2, 9)
    logits = gptj_float64.forward(PARAMS, CONFIG, batch.tokens)
    nll, _ = gptj_float64.token_loss(logits, batch.targets)
    assert float(plain[0]) == pytest.approx(nll.mean(), rel=1e-6)


@pytest.mark.parametrize(("remat", "scan"), [("none", True), ("full", False)])
def test_bfloat16_agrees_with_float32_to_its_own_precision(plain, remat, scan):
    """Operands have 8 bits: each product is off by 2^-9, and errors of a deep sum are random."""
    loss, grads = value_and_grads(Compute(dtype="bfloat16", remat=remat, scan_layers=scan))
    assert float(loss) == pytest.approx(float(plain[0]), rel=5e-3)
    assert_trees_close(grads, plain[1], 3e-2)
    # And it does compute in bfloat16, while gradients keep the weights' type.
    assert relative_l2(grads.head.weight, plain[1].head.weight) > 1e-4
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_the_residual_and_the_norms_are_float32_under_bfloat16():
    """Embeddings of 1 + 2^-12: bfloat16 would round them to 1, and the norm to nothing."""
    tokens = draw_tokens(CONFIG, 1, 4)
    silent = jax.tree.map(jnp.zeros_like, PARAMS.blocks)
    table = 1 + 2.0**-12 * PARAMS.embedding.tokens
    params = dataclasses.replace(PARAMS, blocks=silent, embedding=Embedding(tokens=table))
    bf16 = Compute(dtype="bfloat16")
    found = jax.jit(lambda p: hidden_states(p, CONFIG, tokens, bf16))(params)
    wanted = gptj_float64.layer_norm(
        np.asarray(table, np.float64)[np.asarray(tokens)],
        np.asarray(params.final_norm.scale),
        np.asarray(params.final_norm.offset),
        CONFIG.layer_norm_epsilon,
    )
    assert found.dtype == jnp.float32
    assert relative_max(found, wanted) < 1e-3


def test_logits_are_the_heads_product_with_the_hidden_states():
    tokens = draw_tokens(CONFIG, 2, 5)
    hidden = hidden_states(PARAMS, CONFIG, tokens, F32)
    wanted = np.asarray(hidden, np.float64) @ np.asarray(PARAMS.head.weight).T
    wanted += np.asarray(PARAMS.head.bias)
    assert relative_max(unembed(PARAMS, hidden, F32), wanted) < 1e-6


def test_weights_stored_in_bfloat16_give_the_rounded_models_logits():
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    tokens = draw_tokens(CONFIG, 2, 9)
    found = logits_of(CONFIG, stored, tokens)
    assert found.dtype == jnp.float32
    assert relative_max(found, gptj_float64.forward(widened, CONFIG, tokens)) < 1e-5
