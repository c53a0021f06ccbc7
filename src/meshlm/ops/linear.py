"""Products with weights, biases, embedding lookup and layer norm.

Dim letters: B batch, T time, D model, V vocabulary rows, M rows (batch and time flattened),
K contracted, N out. A weight is [out..., in...]; a product contracts the trailing dims of both.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import is_one_cpu, reshard
from meshlm.ops.cpu import streamed as streaming
from meshlm.ops.cpu import xla
from meshlm.ops.weights import Matrix, as_matrix

Product = tuple[Float[Array, "..."], Matrix, int]
"""x [..., in], a weight [out..., in] and the number of dims to contract."""


def operand(x: Float[Array, "..."], weights: Sequence[Matrix]) -> Float[Array, "..."]:
    """Returns x as products with all these weights take it: in their dtype, if they have one."""
    (dtype, *others) = {weight.operand_dtype for weight in weights}
    return x if others or dtype is None else x.astype(dtype)


def dots(
    products: Sequence[Product], *, partial: bool = False, streamed: bool = False
) -> list[Float[Array, "..."]]:
    """Returns `Matrix.dot` of each (x, weight, dims to contract), all x of as many rows.

    Args:
        products: each x is cast to the dtype in which its weight takes it.
        partial: see `Matrix.dot`.
        streamed: take the form that reads weights fastest where it can be had; it has no gradient.
    """
    products = [(operand(x, [weight]), weight, n) for x, weight, n in products]
    first, _, contract = products[0]
    if streamed and streaming.is_faster(math.prod(first.shape[: first.ndim - contract])):
        return _streamed_dots(products)
    return [weight.dot(x, contract=n, partial=partial) for x, weight, n in products]


def _streamed_dots(products: Sequence[Product]) -> list[jax.Array]:
    operands, shapes = [], []
    for x, weight, contract in products:
        rows = x.shape[: x.ndim - contract]
        shapes.append((*rows, *weight.shape[: weight.ndim - contract]))
        operands.append(weight.streamed_operands(x.reshape(math.prod(rows), -1), contract))
    results = streaming.products(operands)
    return [y_MN.reshape(shape) for y_MN, shape in zip(results, shapes, strict=True)]


def add_bias(x: Float[Array, "B T N"], bias: Float[Array, "N"]) -> Float[Array, "B T N"]:
    """Returns x plus the bias, in float32."""
    bias = bias.astype(jnp.float32)
    if is_one_cpu():
        return xla.add_bias(x.reshape(-1, x.shape[-1]), bias).reshape(x.shape)
    return x + bias[None, None]


def lookup(table: Array | Matrix, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the float32 rows of a table [V, D] for each token, whole along D.

    Where D is split over `model`, every device looks its own columns up, and one all-gather of
    activations joins them.
    """
    rows_BTD = as_matrix(table).rows(tokens_BT, None, "table_embed")
    return reshard(rows_BTD, "batch", None, None)


def layer_norm(
    x: Float[Array, "B T D"],
    scale: Float[Array, "D"],
    offset: Float[Array, "D"],
    epsilon: float,
) -> Float[Array, "B T D"]:
    """Returns x in float32 with mean 0 and (population) variance 1 over D, scaled and offset."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon) * scale[None, None].astype(jnp.float32)
    return add_bias(normed, offset)
