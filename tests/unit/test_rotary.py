"""Rotary embedding against a rotation of complex numbers in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.ops.rotary import apply_rotary, rotary_table, table_rows
from tiny import mesh_of

turn = jax.jit(apply_rotary)


def rotate(x, positions=None, rotary_dim=4, context=64):
    """x [B, T, N, H] rotated by the code under test."""
    sin, cos = rotary_table(context, rotary_dim)
    rows = [table_rows(table, positions, x.shape[1]) for table in (sin, cos)]
    return np.asarray(turn(x, *rows))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=8)
@given(
    length=st.integers(1, 9),
    heads=st.integers(1, 3),
    half=st.integers(1, 8),
    rest=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_it_turns_interleaved_pairs_as_complex_numbers(length, heads, half, rest, seed):
    x = draw(2, length, heads, 2 * half + rest, seed=seed)
    wanted = gptj_float64.rotate(x, np.arange(length), 2 * half)
    np.testing.assert_allclose(rotate(x, rotary_dim=2 * half), wanted, atol=1e-6)


def test_one_pair_by_hand():
    # The pair (2, 3) of four rotary dims turns by position / 10,000^(2/4) = position / 100.
    x = np.zeros((1, 8, 1, 6), np.float32)
    x[..., 2] = 1
    turned = rotate(x)[0, 7, 0]
    np.testing.assert_allclose(turned, [0, 0, np.cos(0.07), np.sin(0.07), 0, 0], atol=1e-7)
    # And (0, 1) by the position itself, the sine on the odd dim positive.
    x = np.zeros((1, 8, 1, 6), np.float32)
    x[..., 0] = 1
    np.testing.assert_allclose(rotate(x)[0, 1, 0, :2], [np.cos(1), np.sin(1)], atol=1e-7)


def test_the_exponent_runs_over_the_rotary_dims_not_the_heads():
    # GPT-J's: 64 of 256. The last pair's wavelength tells: 10,000^(62/64), not 10,000^(62/256).
    sin, cos = rotary_table(2048, 64)
    assert sin.shape == cos.shape == (2048, 32)
    np.testing.assert_allclose(sin[1], np.sin(10_000.0 ** -(np.arange(0, 64, 2) / 64)), rtol=1e-6)


def test_the_table_is_computed_in_float64():
    sin, cos = rotary_table(2048, 64)
    angles = np.outer(np.arange(2048), 10_000.0 ** -(np.arange(0, 64, 2) / 64))
    assert sin.dtype == cos.dtype == np.float32
    # A float32 angle of 2,000 is off by 1e-4; half a unit in the last place of 1 is 6e-8.
    assert np.abs(sin - np.sin(angles)).max() < 6.1e-8
    assert np.abs(cos - np.cos(angles)).max() < 6.1e-8


def test_the_base_is_a_parameter():
    sin, _ = rotary_table(4, 4, base=100.0)
    np.testing.assert_allclose(sin[1], np.sin([1.0, 0.1]), rtol=1e-6)


def test_dims_past_the_rotary_ones_pass_through_unchanged():
    x = draw(2, 5, 3, 10)
    assert (rotate(x)[..., 4:] == x[..., 4:]).all()


def test_position_zero_turns_nothing():
    x = draw(2, 1, 3, 10)
    assert (rotate(x) == x).all()


def test_norms_stay():
    x = draw(2, 30, 3, 8)
    np.testing.assert_allclose(
        np.linalg.norm(rotate(x, rotary_dim=8), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


@settings(max_examples=15)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_a_product_depends_on_the_distance_alone(m, n, shift):
    q, k = draw(1, 1, 1, 8, seed=1), draw(1, 1, 1, 8, seed=2)

    def product(at_q, at_k):
        at = [jnp.full((1, 1), position, jnp.int32) for position in (at_q, at_k)]
        return float((rotate(q, at[0], 8) * rotate(k, at[1], 8)).sum())

    assert product(m, n) == pytest.approx(product(m + shift, n + shift), abs=2e-6)


def test_positions_choose_rows_of_the_table():
    x = draw(2, 3, 2, 8)
    positions = np.array([[4, 5, 6], [0, 9, 2]], np.int32)
    wanted = np.stack([gptj_float64.rotate(x[b], positions[b], 4) for b in range(2)])
    np.testing.assert_allclose(rotate(x, jnp.asarray(positions)), wanted, atol=1e-6)


def test_the_result_is_float32():
    x = jnp.asarray(draw(1, 3, 2, 8), jnp.bfloat16)
    sin, cos = (table_rows(t, None, 3) for t in rotary_table(8, 4))
    out = apply_rotary(x, sin, cos)
    assert out.dtype == jnp.float32
    wanted = gptj_float64.rotate(np.asarray(x, np.float64), np.arange(3), 4)
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_rows_stay_split_with_their_positions():
    mesh = mesh_of(1, 4, 2)
    with jax.set_mesh(mesh):
        positions = jax.device_put(
            np.tile(np.arange(3, dtype=np.int32), (4, 1)), jax.NamedSharding(mesh, jax.P("data"))
        )
        rows = table_rows(rotary_table(8, 4)[0], positions, 3)
    assert rows.addressable_shards[0].data.shape == (1, 3, 2)
