"""The forms of a weight: what a product or a look-up takes, whatever is stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.core.sharding import use_mesh
from meshlm.core.tree import count_bytes, to_named
from meshlm.ops.linear import dots, lookup, operand
from meshlm.ops.weights import Dense, Int8, as_matrix
from tiny import mesh_of, relative_max

TOKENS = jnp.asarray([[0, 10, 3], [3, 3, 7]])


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_a_plain_array_is_dense_and_other_forms_are_themselves():
    array = draw(3, 4)
    dense, in_int8 = as_matrix(array), Int8.from_array(array)
    assert isinstance(dense, Dense)
    assert dense.array is array
    assert as_matrix(in_int8) is in_int8
    assert dense.shape == in_int8.shape == (3, 4)
    assert dense.ndim == in_int8.ndim == 2


def test_the_arrays_of_a_form_are_leaves_of_the_tree():
    tree = {"weight": Int8.from_array(draw(3, 4, 5), contract=2)}
    named = to_named(tree)
    assert {name: leaf.shape for name, leaf in named.items()} == {
        "weight.values": (3, 4, 5),
        "weight.scale": (3,),
    }
    assert count_bytes(tree) == 60 + 12


@pytest.mark.parametrize("contract", [1, 2])
def test_an_array_in_int8_stands_for_numbers_near_it(contract):
    array = draw(3, 4, 5)
    found = Int8.from_array(array, contract).to_array()
    assert found.dtype == jnp.float32
    assert relative_max(found, array) < 0.5 / 127 + 1e-6
    half = Int8.from_array(array, contract).to_array(jnp.bfloat16)
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))


def test_a_lookup_in_int8_gives_the_rows_that_the_table_stands_for():
    table = Int8.from_array(draw(11, 6))
    np.testing.assert_array_equal(lookup(table, TOKENS), table.to_array()[TOKENS])


@pytest.mark.parametrize("in_int8", [False, True])
def test_a_lookup_of_a_split_table_is_that_of_a_whole_one(in_int8):
    array = draw(11, 8)
    table = Int8.from_array(array) if in_int8 else array
    wanted = lookup(table, TOKENS)
    with use_mesh(mesh_of(data=2, model=2)):
        found = jax.jit(lookup)(table, TOKENS)
    np.testing.assert_array_equal(found, wanted)


def test_activations_are_cast_to_what_all_their_weights_take():
    x = draw(2, 4)
    dense = Dense(draw(3, 4).astype(jnp.bfloat16))
    in_int8 = Int8.from_array(draw(3, 4))
    assert operand(x, [dense, dense]).dtype == jnp.bfloat16
    assert operand(x, [in_int8, in_int8]) is x
    # Of several forms each casts its own.
    assert operand(x, [dense, in_int8]) is x
    first, second = dots([(x, dense, 1), (x, in_int8, 1)])
    np.testing.assert_array_equal(first, dense.dot(x.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(second, in_int8.dot(x))


@pytest.mark.parametrize("streamed", [False, True])
def test_products_of_several_forms_in_one_call(streamed):
    x = draw(2, 3, 5)
    weights = [Dense(draw(7, 5)), Int8.from_array(draw(6, 2, 5)), Dense(draw(3, 5))]
    found = dots([(x, weight, 1) for weight in weights], streamed=streamed)
    assert [y.shape for y in found] == [(2, 3, 7), (2, 3, 6, 2), (2, 3, 3)]
    for y, weight in zip(found, weights, strict=True):
        np.testing.assert_allclose(y, weight.plain_dot(x), rtol=1e-5, atol=1e-5)


def split_of(x: jax.Array) -> jax.sharding.PartitionSpec:
    return jax.typeof(x).sharding.spec


def test_each_array_is_gathered_by_its_own_dims():
    array = draw(4, 8)
    in_int8 = Int8.from_array(array)
    with use_mesh(mesh_of(data=2, model=2)):
        dense = Dense(array).gathered("heads", "embed", dtype="bfloat16").array
        in_int8 = in_int8.gathered("heads", "embed", dtype="bfloat16")
    assert (dense.dtype, in_int8.values.dtype) == (jnp.bfloat16, jnp.int8)
    assert split_of(dense) == split_of(in_int8.values) == jax.P("model", None)
    assert split_of(in_int8.scale) == jax.P("model")


@pytest.mark.parametrize(
    ("stored", "computed", "kept"),
    [
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
    ],
)
def test_a_kept_array_is_no_wider_than_its_products_take_it(stored, computed, kept):
    array = draw(3, 4).astype(stored)
    found = Dense(array).narrowed(computed)
    assert found.dtype == kept
    np.testing.assert_array_equal(found, array.astype(kept))


def test_int8_is_kept_as_it_is():
    in_int8 = Int8.from_array(draw(3, 4))
    assert in_int8.narrowed("bfloat16") is in_int8
