"""Cross-entropy and the original's z-loss against float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.ops.loss import token_loss
from tiny import relative_l2


def draw(batch=2, length=5, vocab=17, scale=3.0, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = (shift + scale * rng.standard_normal((batch, length, vocab))).astype(np.float32)
    return logits, rng.integers(0, vocab, (batch, length)).astype(np.int32)


def softmax(logits):
    exps = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


@settings(max_examples=20)
@given(
    vocab=st.sampled_from([1, 2, 40]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    shift=st.sampled_from([0.0, -50.0, 2e4]),
    seed=st.integers(0, 9),
)
def test_the_loss_of_every_token(vocab, scale, shift, seed):
    logits, targets = draw(2, 3, vocab, scale, shift, seed)
    found = jax.jit(token_loss)(logits, targets)
    nll, z = gptj_float64.token_loss(logits, targets)
    np.testing.assert_allclose(found.nll_BT, nll, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(found.z_BT, z, rtol=2e-6, atol=1e-6)


def test_equal_logits_lose_log_v():
    found = token_loss(jnp.full((1, 2, 50_400), 7.0), jnp.asarray([[0, 50_399]]))
    np.testing.assert_allclose(found.nll_BT, np.log(50_400), rtol=1e-6)
    np.testing.assert_allclose(found.z_BT, np.log(50_400) ** 2, rtol=1e-6)


def test_the_gradient_is_softmax_minus_the_label():
    logits, targets = draw()
    weight = np.random.default_rng(1).standard_normal(targets.shape).astype(np.float32)
    found = jax.jit(jax.grad(lambda x: jnp.sum(weight * token_loss(x, targets).nll_BT)))(logits)
    wanted = (softmax(logits) - np.eye(17)[targets]) * weight[..., None]
    assert relative_l2(found, wanted) < 1e-6


def test_the_z_penalty_takes_the_maximum_for_a_constant():
    """2 log-sum softmax; were the maximum differentiated, its own entry would lose 2 log-sum."""
    logits, targets = draw()
    found = jax.jit(jax.grad(lambda x: jnp.sum(token_loss(x, targets).z_BT)))(logits)
    _, z = gptj_float64.token_loss(logits, targets)
    wanted = 2 * np.sqrt(z)[..., None] * softmax(logits)
    assert relative_l2(found, wanted) < 1e-6


def test_the_z_penalty_does_not_see_a_shift():
    # It pulls on the log-sum-exp relative to the largest logit, not on log Z.
    logits, targets = draw()
    here, there = (jax.jit(token_loss)(x, targets) for x in (logits, logits + 64))
    np.testing.assert_allclose(there.z_BT, here.z_BT, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_stay_finite(scale):
    logits, targets = draw(scale=scale)

    def loss(logits):
        parts = token_loss(logits, targets)
        return jnp.sum(parts.nll_BT) + jnp.sum(parts.z_BT)

    loss, grads = jax.jit(jax.value_and_grad(loss))(logits)
    assert np.isfinite(loss)
    assert np.isfinite(grads).all()


def test_a_logit_that_is_no_number_is_seen():
    logits, targets = draw()
    logits[0, 1, 3] = np.nan
    found = np.asarray(token_loss(jnp.asarray(logits), jnp.asarray(targets)).nll_BT)
    assert np.isnan(found[0, 1])
    assert np.isfinite(np.delete(found.ravel(), 1)).all()


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets = draw(vocab=1000)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    found = token_loss(rounded, jnp.asarray(targets))
    assert found.nll_BT.dtype == jnp.float32
    nll, _ = gptj_float64.token_loss(np.asarray(rounded, np.float64), targets)
    np.testing.assert_allclose(found.nll_BT, nll, rtol=1e-5)
