"""Trees of dataclasses: names, the way back from names, casting, sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.core import tree
from meshlm.core.tree import pytree


@pytree
class Leaf:
    weight: Any
    bias: Any


@pytree
class Node:
    first: Leaf
    rest: Any


def sample() -> Node:
    return Node(
        first=Leaf(weight=jnp.ones((2, 3)), bias=jnp.zeros(3, jnp.bfloat16)),
        rest=(jnp.arange(4), {"deep": jnp.full((5,), 2.0)}),
    )


NAMES = ["first.weight", "first.bias", "rest.0", "rest.1.deep"]


def test_nodes_are_frozen_and_keyword_only():
    node = sample()
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.rest = ()
    with pytest.raises(TypeError):
        Leaf(1, 2)
    with pytest.raises(TypeError):
        Leaf(weight=1)


def test_leaves_have_dotted_names_in_the_order_of_the_fields():
    assert list(tree.to_named(sample())) == NAMES
    assert [leaf.shape for leaf in jax.tree.leaves(sample())] == [(2, 3), (3,), (4,), (5,)]


def test_from_named_is_the_inverse_of_to_named():
    node = sample()
    back = tree.from_named(jax.tree.map(lambda _: None, node, is_leaf=lambda x: False), {})
    assert jax.tree.leaves(back) == []
    shuffled = dict(reversed(tree.to_named(node).items()))
    back = tree.from_named(node, shuffled)
    assert jax.tree.structure(back) == jax.tree.structure(node)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(node), strict=True))


def test_from_named_wants_every_name():
    named = tree.to_named(sample())
    del named["rest.1.deep"]
    with pytest.raises(KeyError, match="deep"):
        tree.from_named(sample(), named)


def test_map_named_gives_each_leaf_its_name():
    assert jax.tree.leaves(tree.map_named(lambda name, _: name, sample())) == NAMES
    sums = tree.map_named(lambda name, a, b: (name, a, b), {"x": 1}, {"x": 2})
    assert sums == {"x": ("x", 1, 2)}


def test_a_transformation_may_put_anything_into_the_leaves():
    @pytree
    class Strict:
        x: Any

        def __post_init__(self) -> None:
            assert isinstance(self.x, int)

    doubled = jax.tree.map(lambda _: "not an int", Strict(x=1))
    assert doubled.x == "not an int"
    with pytest.raises(AssertionError):
        Strict(x="not an int")


def test_nodes_go_through_jit_grad_and_eval_shape():
    node = Leaf(weight=jnp.arange(3.0), bias=jnp.ones(()))
    grads = jax.jit(jax.grad(lambda n: jnp.sum(n.weight**2) * n.bias))(node)
    np.testing.assert_array_equal(grads.weight, [0.0, 2.0, 4.0])
    np.testing.assert_array_equal(grads.bias, 5.0)
    assert jax.eval_shape(lambda n: n, node).weight.shape == (3,)


def test_casting_leaves_integers_alone():
    cast = tree.cast_floating(sample(), jnp.float16)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(cast)] == [
        "float16",
        "float16",
        "int32",
        "float16",
    ]


def test_counting():
    assert tree.count_elements(sample()) == 6 + 3 + 4 + 5
    assert tree.count_bytes(sample()) == 6 * 4 + 3 * 2 + 4 * 4 + 5 * 4
    assert tree.count_elements({"scalar": jnp.zeros(()), "none": None}) == 1
    # More than 2**31 elements, from shapes alone.
    big = jax.ShapeDtypeStruct((50_400, 4_096, 28), jnp.bfloat16)
    assert tree.count_bytes([big]) == 2 * 50_400 * 4_096 * 28
