"""What decoding is made of on a CPU, by the kernels of core/kernels.c: no gradients.

Products of a few rows that read each weight once, and the attention of one token to a cache that
reads the places in use alone. The plain references are `linear.plain_dot`, `quantised.dot` for
weights in int8, and `attention.attend`.

Dim letters: M rows, K contracted, B batch, N out or heads, S places, H head dim.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshlm.core.kernels import ATTENTION, PRODUCTS, kernels
from meshlm.core.sharding import is_split, target_platform
from meshlm.ops.quantised import Quantised

# From here on XLA's products, which compute rather than read, are as fast.
MAX_ROWS = 32
_MAX_PRODUCTS = 8
_LANES = 16
_TYPES = (jnp.float32, jnp.bfloat16)


def is_faster(num_rows: int) -> bool:
    """True where this module's form is the fast one: few rows, one CPU device, a C compiler."""
    few = num_rows <= MAX_ROWS and target_platform() == "cpu" and not is_split()
    return few and kernels().ready


def can_attend(q_BTNH: jax.Array) -> bool:
    """True where `attend` is the fast form: of one new token a row, with heads of whole vectors."""
    num_rows, length, _, head_dim = q_BTNH.shape
    return length == 1 and head_dim % _LANES == 0 and is_faster(num_rows)


def dots(pairs: Sequence[tuple[jax.Array, jax.Array | Quantised, int]]) -> list[jax.Array]:
    """Returns x times weight for each (x, weight, dims to contract), all in one call.

    Every x has the same number of rows; x and weight have the same type, but for a weight in int8,
    where x may have any.
    """
    assert len(pairs) <= _MAX_PRODUCTS
    operands: list[jax.Array] = []
    results, shapes = [], []
    for x, weight, contract in pairs:
        rows = x.shape[: x.ndim - contract]
        outs = weight.shape[: weight.ndim - contract]
        x_MK = x.reshape(math.prod(rows), -1)
        if isinstance(weight, Quantised):
            values_NK = weight.values.reshape(math.prod(outs), -1)
            operands += [x_MK.astype(jnp.float32), values_NK, weight.scale.reshape(-1)]
        else:
            assert x.dtype == weight.dtype
            assert x.dtype in _TYPES
            operands += [x_MK, weight.reshape(math.prod(outs), -1)]
        results.append(jax.ShapeDtypeStruct((math.prod(rows), math.prod(outs)), jnp.float32))
        shapes.append((*rows, *outs))
    found = jax.ffi.ffi_call(PRODUCTS, results)(*operands)
    return [y_MN.reshape(shape) for y_MN, shape in zip(found, shapes, strict=True)]


def attend(
    q_BNH: Float[Array, "B N H"],
    keys_BNSH: Float[Array, "B N S H"],
    values_BNSH: Float[Array, "B N S H"],
    lengths_B: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    """Returns softmax(q k / sqrt(H)) v in float32, over each row's first `lengths_B` places."""
    result = jax.ShapeDtypeStruct(q_BNH.shape, jnp.float32)
    operands = (q_BNH.astype(jnp.float32), keys_BNSH, values_BNSH, lengths_B.astype(jnp.int32))
    return jax.ffi.ffi_call(ATTENTION, result)(*operands)
