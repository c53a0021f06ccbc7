"""Products with weights, the lookup and layer norm, against float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.ops.linear import add_bias, layer_norm, lookup
from meshlm.ops.weights import as_matrix
from tiny import relative_l2, relative_max


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dot(x, weight, contract=1):
    return as_matrix(weight).dot(x, contract=contract)


jitted_norm = jax.jit(lambda x, scale, offset: layer_norm(x, scale, offset, 1e-5))


def exact(x):
    return np.asarray(x, np.float64)


# x, weight [out..., in...], dims to contract, the same as an einsum.
CASES = [
    ((2, 5, 8), (3, 8), 1, "btd,fd->btf"),
    ((2, 5, 8), (3, 4, 8), 1, "btd,nhd->btnh"),
    ((2, 5, 3, 4), (8, 3, 4), 2, "btnh,dnh->btd"),
    ((1, 1, 8), (1, 8), 1, "btd,fd->btf"),
    ((1, 1, 64), (300, 64), 1, "btd,fd->btf"),
    ((2, 64, 96), (160, 96), 1, "btd,fd->btf"),
    ((6, 8), (3, 8), 1, "td,fd->tf"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("x", "weight", "contract", "einsum"), CASES)
def test_a_product_contracts_the_last_dims_and_sums_in_float32(x, weight, contract, einsum, dtype):
    x, weight = draw(*x, dtype=dtype), draw(*weight, seed=1, dtype=dtype)
    found = jax.jit(lambda x, w: dot(x, w, contract=contract))(x, weight)
    assert found.dtype == jnp.float32
    # bfloat16 products are exact in float32, so both types keep float32's precision.
    assert relative_max(found, np.einsum(einsum, exact(x), exact(weight))) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 8e-3)])
@pytest.mark.parametrize(("x", "weight", "contract", "einsum"), CASES)
def test_gradients_of_a_product(x, weight, contract, einsum, dtype, tolerance):
    x, weight = draw(*x, dtype=dtype), draw(*weight, seed=1, dtype=dtype)
    ins, outs = einsum.split("->")
    x_dims, w_dims = ins.split(",")
    cotangent = draw(*np.einsum(einsum, exact(x), exact(weight)).shape, seed=2)

    @jax.jit
    def pull(x, weight, cotangent):
        return jax.vjp(lambda x, w: dot(x, w, contract=contract), x, weight)[1](cotangent)

    dx, dw = pull(x, weight, cotangent)
    assert (dx.dtype, dw.dtype) == (x.dtype, weight.dtype)
    g = exact(cotangent)
    assert relative_l2(dx, np.einsum(f"{outs},{w_dims}->{x_dims}", g, exact(weight))) < tolerance
    assert relative_l2(dw, np.einsum(f"{outs},{x_dims}->{w_dims}", g, exact(x))) < tolerance


def test_long_sums_keep_float32s_precision_in_bfloat16():
    # 1 + 4,095 x 2^-8: a bfloat16 sum would stop growing.
    x = jnp.full((1, 2, 4096), 2**-8, jnp.bfloat16).at[..., 0].set(1.0)
    weight = jnp.ones((2, 4096), jnp.bfloat16)
    np.testing.assert_array_equal(dot(x, weight), 1 + 4095 / 256)


def test_a_bias_is_added_in_float32_and_gathers_the_gradient():
    x, bias, cotangent = draw(2, 5, 7), draw(7, seed=1), draw(2, 5, 7, seed=2)
    np.testing.assert_array_equal(add_bias(x, bias), np.asarray(x) + np.asarray(bias))
    dx, dbias = jax.vjp(add_bias, x, bias)[1](cotangent)
    np.testing.assert_array_equal(dx, cotangent)
    np.testing.assert_allclose(dbias, exact(cotangent).sum((0, 1)), rtol=1e-5, atol=1e-6)
    stored = bias.astype(jnp.bfloat16)
    found = add_bias(x, stored)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(x) + np.asarray(stored, np.float32))


def test_a_lookup_gives_rows():
    table, tokens = draw(11, 6), jnp.asarray([[0, 10, 3], [3, 3, 7]])
    np.testing.assert_array_equal(lookup(table, tokens), np.asarray(table)[np.asarray(tokens)])


def test_the_gradient_of_a_lookup_adds_up_for_a_token_that_comes_again():
    tokens = jnp.asarray([[1, 4, 1, 1]])
    cotangent = draw(1, 4, 3)
    _, pull = jax.vjp(lambda table: lookup(table, tokens), draw(6, 3))
    wanted = np.zeros((6, 3))
    np.add.at(wanted, np.asarray(tokens)[0], exact(cotangent)[0])
    np.testing.assert_allclose(pull(cotangent)[0], wanted, rtol=1e-6)


@settings(max_examples=10)
@given(
    width=st.sampled_from([2, 7, 40]),
    shift=st.sampled_from([0.0, 1.0, 1000.0]),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_layer_norm(width, shift, spread):
    x = shift + spread * draw(2, 3, width)
    scale, offset = draw(width, seed=1), draw(width, seed=2)
    found = jitted_norm(x, scale, offset)
    wanted = gptj_float64.layer_norm(*map(exact, (x, scale, offset)), 1e-5)
    # The mean's rounding is amplified by shift / sqrt(spread^2 + epsilon).
    assert relative_max(found, wanted) < 1e-6 * (1 + shift / np.hypot(spread, 3e-3))


def test_the_variance_is_the_populations_and_epsilon_is_under_the_root():
    x = jnp.asarray([[[0.0, 2.0]]])
    ones, zeros = jnp.ones(2), jnp.zeros(2)
    np.testing.assert_allclose(layer_norm(x, ones, zeros, 3.0)[0, 0], [-0.5, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(layer_norm(0 * x, ones, zeros, 1e-5), 0 * x)


def test_layer_norm_of_bfloat16_is_computed_in_float32():
    x = (100 + draw(1, 2, 64)).astype(jnp.bfloat16)
    found = jitted_norm(x, jnp.ones(64), jnp.zeros(64))
    assert found.dtype == jnp.float32
    assert relative_max(found, gptj_float64.layer_norm(exact(x), 1, 0, 1e-5)) < 1e-4


def test_gradients_of_layer_norm():
    # Of sum(g * norm(x)): invariant to shift and scale of x, so orthogonal to 1 and to x.
    x, g = draw(1, 1, 32), draw(1, 1, 32, seed=1)

    def loss(x, scale, offset):
        return jnp.sum(g * layer_norm(x, scale, offset, 1e-12))

    dx, dscale, doffset = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, jnp.ones(32), jnp.zeros(32))
    assert abs(float(jnp.sum(dx))) < 1e-5
    assert abs(float(jnp.sum(dx * x))) < 1e-5
    np.testing.assert_allclose(doffset, g[0, 0], rtol=1e-6)
    centred = exact(x)[0, 0] - exact(x).mean()
    np.testing.assert_allclose(dscale, exact(g)[0, 0] * centred / exact(x).std(), rtol=1e-4)
