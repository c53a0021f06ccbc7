"""Products with weights, biases, embedding lookup and layer norm.

Dim letters: B batch, T time, D model, V vocabulary rows, M rows (batch and time flattened),
K contracted, N out. A weight is [out..., in...]; a product contracts the trailing dims of both.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import axes_of, reshard, spec
from meshlm.ops import cpu, quantised
from meshlm.ops import streamed as streaming

Matrix = Array | quantised.Quantised


def dots(
    pairs: Sequence[tuple[Float[Array, "..."], Matrix, int]],
    *,
    partial: bool = False,
    streamed: bool = False,
) -> list[Float[Array, "..."]]:
    """Returns `dot` of each (x, weight, dims to contract); every x has the same number of rows.

    Args:
        partial: see `dot`.
        streamed: take the form that reads weights fastest where it can be had; it has no gradient.
    """
    first, _, contract = pairs[0]
    if streamed and streaming.is_faster(math.prod(first.shape[: first.ndim - contract])):
        return streaming.dots(pairs)
    return [dot(x, weight, contract=n, partial=partial) for x, weight, n in pairs]


def dot(
    x: Float[Array, "..."], weight: Matrix, *, contract: int = 1, partial: bool = False
) -> Float[Array, "..."]:
    """Returns x [..., in] times weight [out..., in], accumulated in float32 and of float32.

    Both operands have the same dtype: bfloat16 operands give a float32 result. With a weight in
    int8, x may have any.

    Args:
        x: activations; the last `contract` dims are contracted.
        weight: the last `contract` dims are contracted.
        contract: the number of dims to contract.
        partial: leave the sum over the axes of `heads` to the caller, who adds several such
            products and then reduces once (`core.sharding.reshard`).
    """
    inner = math.prod(x.shape[x.ndim - contract :])
    rows, out = x.shape[: x.ndim - contract], weight.shape[: weight.ndim - contract]
    if isinstance(weight, quantised.Quantised):
        return quantised.dot(x.reshape(-1, inner), weight, contract).reshape(*rows, *out)
    if cpu.is_faster(x.dtype):
        y = cpu.dot(x.reshape(-1, inner), weight.reshape(-1, inner))
        return y.reshape(*rows, *out)
    return plain_dot(x, weight, contract=contract, partial=partial)


def plain_dot(
    x: Float[Array, "..."], weight: Float[Array, "..."], *, contract: int = 1, partial: bool = False
) -> Float[Array, "..."]:
    """Returns what `dot` does, as one product, on any device and mesh: its reference."""
    dims_x = tuple(range(x.ndim - contract, x.ndim))
    dims_w = tuple(range(weight.ndim - contract, weight.ndim))
    return jax.lax.dot_general(
        x,
        weight,
        ((dims_x, dims_w), ((), ())),
        preferred_element_type=jnp.float32,
        out_sharding=_dot_sharding(x, weight, contract, partial),
    )


def _dot_sharding(
    x: jax.Array, weight: jax.Array, contract: int, partial: bool
) -> PartitionSpec | None:
    if jax.sharding.get_abstract_mesh().empty:
        return None
    x_spec, w_spec = (jax.typeof(a).sharding.spec.partitions for a in (x, weight))
    parts = (*x_spec[: x.ndim - contract], *w_spec[: weight.ndim - contract])
    # The contracted dims are split as heads and feed-forward are.
    return PartitionSpec(*parts, unreduced=axes_of("heads") if partial else frozenset())


def add_bias(x: Float[Array, "B T N"], bias: Float[Array, "N"]) -> Float[Array, "B T N"]:
    """Returns x plus the bias, in float32."""
    bias = bias.astype(jnp.float32)
    if cpu.is_faster(jnp.bfloat16):
        return cpu.add_bias(x.reshape(-1, x.shape[-1]), bias).reshape(x.shape)
    return x + bias[None, None]


def lookup(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the rows of `table_VD` for each token, whole along D.

    Where D is split over `model`, every device looks its own columns up, and one all-gather of
    activations joins them.
    """
    local = spec("batch", None, "table_embed", gathered=True)
    return reshard(table_VD.at[tokens_BT].get(out_sharding=local), "batch", None, None)


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
