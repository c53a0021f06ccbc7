"""Parameter trees: dataclasses registered as pytrees, the names of their leaves, sizes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Returns `cls` as a frozen, keyword-only dataclass whose fields are the children of a pytree.

    Unflattening does not run `__init__`: JAX puts shapes, shardings and placeholders into the
    leaves, which a type-checking constructor would refuse.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten_with_keys(node: T) -> tuple[tuple[tuple[Any, Any], ...], None]:
        return tuple((key, getattr(node, key.name)) for key in keys), None

    def flatten(node: T) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(node, name) for name in names), None

    def unflatten(_: None, children: Iterable[Any]) -> T:
        node = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(node, name, child)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the dotted name of a leaf, such as `blocks.attention.query.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def to_named(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of `tree` by their dotted names, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_named(like: PyTree, named: Mapping[str, Any]) -> PyTree:
    """Returns `like` with its leaves from `named`: the inverse of `to_named`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: named[path_name(path)], like)


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Returns `tree` with each leaf replaced by `function(name, leaf, ...)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def cast_floating(tree: PyTree, dtype: Any) -> PyTree:
    """Returns `tree` with every floating-point leaf in `dtype`; integers stay as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def count_elements(tree: PyTree) -> int:
    """Returns the number of elements in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def count_bytes(tree: PyTree) -> int:
    """Returns the bytes of all leaves, each counted once however it is sharded."""
    return sum(
        int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
