"""Cross-entropy and the original's z-loss against float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.ops.loss import head_loss, plain_head_loss, token_loss
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


# From the head's input: in chunks where that is faster, and all at once.


def head_case(batch, length, dtype, depth=16, vocab=48):
    rng = np.random.default_rng(0)
    x, head = (rng.standard_normal(s) for s in ((batch, length, depth), (vocab, depth)))
    x, head = (jnp.asarray(a, dtype) for a in (x, head))
    bias = jnp.asarray(rng.standard_normal(vocab), jnp.float32)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    mask = rng.integers(0, 2, (batch, length)).astype(np.float32)
    return x, head, bias, targets, mask


def head_loss_and_gradients(x, head, bias, targets, mask, z_loss):
    """In float64: the loss, and its gradients by x, head and bias."""
    x, head, bias = (np.asarray(a, np.float64) for a in (x, head, bias))
    logits = x @ head.T + bias
    nll, z = gptj_float64.token_loss(logits, targets)
    g = softmax(logits) * (1 + 2 * z_loss * np.sqrt(z))[..., None] - np.eye(len(bias))[targets]
    g *= mask[..., None]
    gradients = (g @ head, np.einsum("btv,btd->vd", g, x), g.sum((0, 1)))
    return ((nll + z_loss * z) * mask).sum(), gradients


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize(
    ("batch", "length"),
    [(2, 512), (3, 200), (1, 7), (1, 1)],  # whole chunks, a part of one at the end, few rows
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 6e-3)])
@pytest.mark.parametrize("function", [head_loss, plain_head_loss])
def test_the_loss_from_the_heads_input(function, dtype, tolerance, batch, length, z_loss):
    case = head_case(batch, length, dtype)
    case = (*case[:-1], np.ones_like(case[-1])) if length < 6 else case
    loss, grads = jax.jit(
        jax.value_and_grad(lambda *arrays: function(*arrays, z_loss), argnums=(0, 1, 2))
    )(*case)
    wanted_loss, wanted_grads = head_loss_and_gradients(*case, z_loss)
    # Products of bfloat16 are exact in float32; only gradients are rounded again.
    assert float(loss) == pytest.approx(wanted_loss, rel=2e-6)
    for found, wanted, argument in zip(grads, wanted_grads, case, strict=False):
        assert found.dtype == argument.dtype
        assert relative_l2(found, wanted) < tolerance


def test_the_loss_alone_is_the_loss_with_its_gradient():
    case = head_case(2, 6, "bfloat16")
    alone = jax.jit(lambda *arrays: head_loss(*arrays, 0.1))(*case)
    nll_and_z, _ = head_loss_and_gradients(*case, 0.1)
    assert float(alone) == pytest.approx(nll_and_z, rel=2e-6)
