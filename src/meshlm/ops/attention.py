"""Causal attention over whole sequences and over a cache.

Dim letters: B batch, T query time, S key time, N heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row with nothing to look at gives finite weights; the original's value.
MASKED = -1e10


def causal_mask(
    length: int, segment_ids_BT: Int[Array, "B T"] | None = None
) -> Bool[Array, "B N T S"]:
    """Returns which keys each query sees: those before it and itself, of its own segment."""
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segment_ids_BT is None:
        return mask
    same = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    return mask & same


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    mask_BNTS: Bool[Array, "B N T S"],
) -> Float[Array, "B T N H"]:
    """Returns the attention's output in float32: softmax(q k / sqrt(H)) v.

    Products are of the operands' dtype with float32 sums; scores and softmax are float32.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """
    dtype = v_BSNH.dtype
    scores_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32
    ) / math.sqrt(q_BTNH.shape[-1])
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BNTS, scores_BNTS, MASKED), axis=-1)
    return jnp.einsum(
        "BNTS,BSNH->BTNH", weights_BNTS.astype(dtype), v_BSNH, preferred_element_type=jnp.float32
    )
