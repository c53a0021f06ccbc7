"""Products with weights, and layer norm.

Dim letters: B batch, T time, D model. A weight is [out..., in...]; the product contracts the
trailing dims of both operands.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import reshard, spec


def dot(
    x: Float[Array, "..."], weight: Float[Array, "..."], *, contract: int = 1, partial: bool = False
) -> Float[Array, "..."]:
    """Returns x [..., in] times weight [out..., in], accumulated in float32 and of float32.

    Both operands have the same dtype: bfloat16 operands give a float32 result.

    Args:
        x: activations; the last `contract` dims are contracted.
        weight: the last `contract` dims are contracted.
        contract: the number of dims to contract.
        partial: leave the sum over `model` to the caller, who adds several such products and then
            reduces once (`core.sharding.reshard`).
    """
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
    if partial:
        return PartitionSpec(*parts, unreduced=frozenset({"model"}))
    return PartitionSpec(*parts)


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
    return centred * jax.lax.rsqrt(variance + epsilon) * scale[None, None] + offset[None, None]
