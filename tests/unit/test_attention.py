"""Causal attention against a float64 loop over queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.ops.attention import attend, causal_mask, plain_attend_to_cache
from tiny import relative_max

B, T, N, H = 2, 7, 3, 4


def draw(seed=0, shape=(B, T, N, H), scale=1.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(3)]


def attention(q, k, v, mask):
    """`attend` of keys and values [B, S, N, H]; it takes them as a cache keeps them."""
    return attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)


SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 3, 3]], np.int32)


@settings(max_examples=6)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_it_is_softmax_attention(batch, length, heads, head_dim, scale):
    q, k, v = draw(shape=(batch, length, heads, head_dim), scale=scale)
    wanted = gptj_float64.attend(q, k, v, gptj_float64.causal(batch, length))
    found = jax.jit(lambda *x: attention(*x, causal_mask(length)))(q, k, v)
    assert found.dtype == jnp.float32
    assert relative_max(found, wanted) < 1e-5


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_segments_do_not_see_one_another(segments):
    q, k, v = (jnp.asarray(x) for x in draw())
    mask = causal_mask(T, None if segments is None else jnp.asarray(segments))
    wanted = gptj_float64.attend(*draw(), gptj_float64.causal(B, T, segments))
    assert relative_max(attention(q, k, v, mask), wanted) < 1e-6


def test_the_mask_by_hand():
    mask = np.asarray(causal_mask(3, jnp.asarray([[5, 5, 2]])))
    np.testing.assert_array_equal(mask[0, 0], [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(np.asarray(causal_mask(3))[0, 0], np.tril(np.ones((3, 3))))


def test_the_future_and_other_documents_change_no_bit():
    q, k, v = (jnp.asarray(x) for x in draw())
    mask = causal_mask(T, jnp.asarray(SEGMENTS))
    before = np.asarray(attention(q, k, v, mask))
    for t in range(T):
        hidden = ~np.asarray(mask)[:, 0, t, :, None, None]
        after = attention(q, jnp.where(hidden, 99.0, k), jnp.where(hidden, -1e6, v), mask)
        assert (np.asarray(after)[:, t] == before[:, t]).all()


def test_a_query_that_sees_nothing_gives_the_mean_and_not_nan():
    q, k, v = (jnp.asarray(x) for x in draw())
    nothing = jnp.zeros((B, 1, T, T), bool)
    found, grads = jax.jit(jax.value_and_grad(lambda q: attention(q, k, v, nothing).sum()))(q)
    assert np.isfinite(found)
    assert np.isfinite(grads).all()
    wanted = np.asarray(v).mean(1, keepdims=True).repeat(T, 1)
    np.testing.assert_allclose(attention(q, k, v, nothing), wanted, atol=1e-6)


def test_scores_are_float32_even_of_bfloat16():
    """Scores of 1e4 that differ by 1: in bfloat16 they would be equal."""
    q = jnp.full((1, 1, 1, 1), 128.0, jnp.bfloat16)
    k = jnp.asarray([80.0, 80.5], jnp.bfloat16).reshape(1, 2, 1, 1)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    assert attention(q, k, v, jnp.ones((1, 1, 1, 2), bool)).item() == 1.0


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_bfloat16_operands(segments):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw())
    rounded = [np.asarray(x, np.float64) for x in (q, k, v)]
    mask = causal_mask(T, None if segments is None else jnp.asarray(segments))
    wanted = gptj_float64.attend(*rounded, gptj_float64.causal(B, T, segments))
    # Only the weights are rounded once more, to 8 bits.
    assert 1e-6 < relative_max(attention(q, k, v, mask), wanted) < 2**-8


def test_gradients_by_differences():
    q, k, v = draw(shape=(1, 4, 1, 3))
    weight = np.random.default_rng(9).standard_normal(q.shape)
    seen = gptj_float64.causal(1, 4)

    def loss(q, k, v):
        return (attention(q, k, v, causal_mask(4)) * weight.astype(np.float32)).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    arguments = [np.asarray(x, np.float64) for x in (q, k, v)]
    for number, gradient in enumerate(found):
        for at in np.ndindex(q.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arguments]
                moved[number][at] += step
                ends.append((gptj_float64.attend(*moved, seen) * weight).sum())
            slope = (ends[0] - ends[1]) / 2e-5
            assert float(gradient[at]) == pytest.approx(slope, abs=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 3])
def test_nan_in_unused_places_of_a_cache_changes_no_bit(queries, dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in draw())
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    last = np.array([2, 6])[:, None] - np.arange(queries)[::-1]
    mask = jnp.asarray((np.arange(T) <= last[..., None])[:, None])
    unused = ~mask.any(axis=2)[..., None]
    dirty = [jnp.where(unused, jnp.nan, x) for x in (k, v)]
    run = jax.jit(plain_attend_to_cache)
    wanted = np.asarray(run(q[:, :queries], k, v, mask))
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(run(q[:, :queries], *dirty, mask), wanted)
    np.testing.assert_array_equal(jax.jit(attend)(q[:, :queries], k, v, mask), wanted)
