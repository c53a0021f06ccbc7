"""Weights from any source onto a mesh, a tensor at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from meshlm.conversion.cast import cast
from meshlm.conversion.finite import check_finite
from meshlm.conversion.parts import stacked_name, weight_of
from meshlm.conversion.source import Group, Part, Source
from meshlm.core.sharding import sharding_of
from meshlm.core.tree import from_named, to_named
from meshlm.formats.tensor import TensorInfo
from meshlm.model.params import Params, weight_table, weight_tree
from meshlm.model.quantize import FORMS


def matrix_dtype(infos: Mapping[str, TensorInfo]) -> str:
    """Returns the type in which most of the weights are stored."""
    sizes: dict[str, int] = {}
    for info in infos.values():
        size = int(np.prod(info.shape, dtype=np.int64))
        sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + size
    return max(sizes, key=lambda name: sizes[name])


def load_params(
    source: Source, mesh: Mesh, dtype: str | None, *, quantize: str | None = None
) -> Params:
    """Returns the weights with one block per layer, each in its shards on the mesh.

    The host holds one tensor beside what is on the devices.

    Args:
        dtype: of every weight; None keeps each as it is stored, and float16 as float32.
        quantize: the form of the matrices of products, a key of `model.quantize.FORMS`; each is
            made when it is read. For one device.

    Raises:
        BadInputError: a tensor cannot be read, holds NaN or infinities, or a number too large for
            `dtype`.
    """
    quantise = None if quantize is None else FORMS[quantize]
    named: dict[str, Any] = {}
    # Each tensor is checked while it is cast and copied.
    with ThreadPoolExecutor(1, thread_name_prefix="finite") as checking:
        for part in source.parts():
            for name, info in part.tensors.items():
                weight, stored = weight_of(source.model, name), part.read(name)
                checked = checking.submit(check_finite, stored, part.place(name))
                wanted = dtype or ("float32" if info.dtype == np.float16 else info.dtype.name)
                value = cast(stored, jnp.dtype(wanted), name)
                placed = _place(value, sharding_of(mesh, *weight.dims))
                named[name] = placed if quantise is None else quantise(weight, placed)
                # Only now, so that no second tensor waits beside this one.
                jax.block_until_ready(named[name])
                checked.result()
                del stored, value, placed
    weights = weight_tree(source.model)
    blocks = (weights.blocks,) * source.model.num_layers
    return from_named(dataclasses.replace(weights, blocks=blocks), named)


def _place(value: np.ndarray, where: NamedSharding) -> jax.Array:
    """Returns the array on its devices; every process brings the shards that it holds."""
    if len(where.device_set) == 1:
        # The device's own memory, not a view of a file that may be gone tomorrow.
        return jax.device_put(value, where, may_alias=False).block_until_ready()
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def load_stacked(
    source: Source, group: Group, abstract: Params, on_part: Callable[[Part], None] | None = None
) -> Params:
    """Returns weights or moments as training has them: layers stacked, float32, sharded.

    A bias that the source's model does not have is zero. The host holds everything for a moment.

    Args:
        abstract: their shapes and shardings.
        on_part: called with each part that was read.

    Raises:
        BadInputError: a tensor cannot be read, or holds NaN or infinities.
    """
    named = to_named(abstract)
    whole: dict[str, Any] = {n: np.empty(leaf.shape, np.float32) for n, leaf in named.items()}
    for name in whole.keys() - weight_table(source.model).keys():
        whole[name][...] = 0
    for part in source.parts(group):
        for name in part.tensors:
            stacked, layer = stacked_name(name)
            whole[stacked][... if layer is None else layer] = part.read_finite(name)
        if on_part:
            on_part(part)
    placed = {name: _place(whole.pop(name), named[name].sharding) for name in list(whole)}
    return from_named(abstract, placed)
