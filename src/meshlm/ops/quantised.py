"""Products in int8: weights with a scale for each output, activations with one for each row.

Both are rounded to whole numbers from -127 to 127, the largest of its row; their products and sums
are exact in int32. Nothing is learned or calibrated.

Dim letters: M rows, K contracted, N out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from meshlm.core.tree import pytree

_LARGEST = 127.0
# XLA divides by a constant so; the kernel does too, and both give the same bits.
_UNIT = float(np.float32(1) / np.float32(127))


@pytree
class Quantised:
    """A weight [out..., in...] in int8."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]
    """[out...], float32: what one unit stands for in this output."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The weight's dims."""
        return self.values.ndim


def quantise(weight: Float[Array, "..."], contract: int = 1) -> Quantised:
    """Returns the weight in int8; its last `contract` dims are those that a product contracts."""
    outs = weight.shape[: weight.ndim - contract]
    values, scale = quantise_rows(weight.reshape(math.prod(outs), -1))
    return Quantised(values=values.reshape(weight.shape), scale=scale.reshape(outs))


def dequantise(weight: Quantised) -> Float[Array, "..."]:
    """Returns the float32 weight that the int8 one stands for."""
    outs = weight.scale.shape
    scale = weight.scale.reshape(*outs, *([1] * (weight.ndim - len(outs))))
    return weight.values.astype(jnp.float32) * scale


def quantise_rows(x_MK: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float[Array, "M"]]:
    """Returns each row in int8, and what one unit stands for in it.

    A row of zeros stays one; one that is not finite has a scale that is not.
    """
    x_MK = x_MK.astype(jnp.float32)
    largest_M = jnp.max(jnp.abs(x_MK), axis=-1)
    factor_M = jnp.where(largest_M > 0, _LARGEST / largest_M, 0.0)
    factor_M = jnp.where(jnp.isfinite(factor_M), factor_M, 0.0)
    whole_MK = jnp.nan_to_num(jnp.round(x_MK * factor_M[:, None]))
    return whole_MK.astype(jnp.int8), largest_M * _UNIT


def dot(x_MK: Float[Array, "M K"], weight: Quantised, contract: int = 1) -> Float[Array, "M N"]:
    """Returns the float32 product, with x rounded row by row."""
    num_rows = x_MK.shape[0]
    outs = weight.ndim - contract
    values_NK = weight.values.reshape(math.prod(weight.shape[:outs]), -1)
    rows_MK, scale_M = quantise_rows(x_MK)
    if num_rows == 1:
        # XLA on CPUs converts all weights to int32 for a single row.
        rows_MK = jnp.pad(rows_MK, ((0, 1), (0, 0)))
    sums_MN: Int[Array, "M N"] = jax.lax.dot_general(
        rows_MK, values_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )[:num_rows]
    return sums_MN.astype(jnp.float32) * (scale_M[:, None] * weight.scale.reshape(-1)[None])
