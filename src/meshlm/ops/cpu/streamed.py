"""Decoding on a CPU by compiled kernels, which read weights and cache once: no gradients.

Products of a few rows read each weight as it lies, all products of a call together. The attention
of one new token reads only the places of the cache that are in use. The plain references are
`Matrix.plain_dot` (ops/weights.py) and `plain_attend_to_cache` (ops/attention.py).

Dim letters: M rows, K contracted, B batch, N out or heads, S places, H head dim.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import is_one_cpu
from meshlm.ops.cpu.library import ATTENTION, PRODUCTS, kernels

# With more rows XLA's products are as fast: they compute rather than read.
_MAX_ROWS = 32
_MAX_PRODUCTS = 8
_LANES = 16


def is_faster(num_rows: int) -> bool:
    """True where the kernels are there and the fast form: few rows on one CPU device."""
    return num_rows <= _MAX_ROWS and is_one_cpu() and kernels().ready


def can_attend(q_BTNH: jax.Array) -> bool:
    """True where `attend` is the fast form: one new token a row, head dims in whole vectors."""
    num_rows, length, _, head_dim = q_BTNH.shape
    return length == 1 and head_dim % _LANES == 0 and is_faster(num_rows)


def products(operands: Sequence[Sequence[jax.Array]]) -> list[Float[Array, "M N"]]:
    """Returns the float32 product of each group of operands, all in one call.

    Args:
        operands: of each product, x [M, K] and a weight [N, K] of the same dtype, float32 or
            bfloat16; or x in float32, a weight in int8 and its scales [N]. All have the same M.
    """
    assert len(operands) <= _MAX_PRODUCTS
    results = [
        jax.ShapeDtypeStruct((x_MK.shape[0], weight_NK.shape[0]), jnp.float32)
        for x_MK, weight_NK, *_ in operands
    ]
    call = jax.ffi.ffi_call(PRODUCTS, results)
    return list(call(*(array for group in operands for array in group)))


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
