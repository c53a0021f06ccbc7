"""Causal attention over whole sequences and over a cache.

Dim letters: B batch, T query time, S key time, N heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meshlm.core.sharding import target_platform
from meshlm.ops.cpu import streamed

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
    k_BNSH: Float[Array, "B N S H"],
    v_BNSH: Float[Array, "B N S H"],
    mask_BNTS: Bool[Array, "B N T S"],
) -> Float[Array, "B T N H"]:
    """Returns the attention's output in float32: softmax(q k / sqrt(H)) v.

    Products are of the operands' dtype with float32 sums; scores and softmax are float32. Keys and
    values come as a cache keeps them, so that decoding transposes none of it.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """
    on_cpu = target_platform() == "cpu"
    if on_cpu and q_BTNH.shape[1] == 1:
        # Products with one row have no bfloat16 kernel there.
        q_BTNH, k_BNSH, v_BNSH = (x.astype(jnp.float32) for x in (q_BTNH, k_BNSH, v_BNSH))
    q_BNTH = q_BTNH.transpose(0, 2, 1, 3)
    if on_cpu:
        # A transposition that is folded into a bfloat16 product leaves one that has no kernel.
        q_BNTH, k_BNSH, v_BNSH = jax.lax.optimization_barrier((q_BNTH, k_BNSH, v_BNSH))
    scores_BNTS = jnp.einsum(
        "BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32
    ) / math.sqrt(q_BNTH.shape[-1])
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BNTS, scores_BNTS, MASKED), axis=-1)
    mixed_BNTH = jnp.einsum(
        "BNTS,BNSH->BNTH",
        weights_BNTS.astype(v_BNSH.dtype),
        v_BNSH,
        preferred_element_type=jnp.float32,
    )
    if on_cpu:
        mixed_BNTH = jax.lax.optimization_barrier(mixed_BNTH)
    return mixed_BNTH.transpose(0, 2, 1, 3)


def attend_to_cache(
    q_BTNH: Float[Array, "B T N H"],
    keys_BNSH: Float[Array, "B N S H"],
    values_BNSH: Float[Array, "B N S H"],
    mask_BNTS: Bool[Array, "B N T S"],
    start_B: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    """Returns `plain_attend_to_cache` in the form that is fast on the platform; it has no gradient.

    Args:
        mask_BNTS: the places that each query sees: its own and those before.
        start_B: the place of each row's first query.
    """
    if streamed.can_attend(q_BTNH):
        return streamed.attend(q_BTNH[:, 0], keys_BNSH, values_BNSH, start_B + 1)[:, None]
    return plain_attend_to_cache(q_BTNH, keys_BNSH, values_BNSH, mask_BNTS)


def plain_attend_to_cache(
    q_BTNH: Float[Array, "B T N H"],
    keys_BNSH: Float[Array, "B N S H"],
    values_BNSH: Float[Array, "B N S H"],
    mask_BNTS: Bool[Array, "B N T S"],
) -> Float[Array, "B T N H"]:
    """Returns what `attend` does, whatever lies in places that no query sees.

    An earlier occupant may have left NaN there, and zero times NaN is NaN.
    """
    seen_BNS1 = mask_BNTS.any(axis=2)[..., None]
    return attend(q_BTNH, keys_BNSH, jnp.where(seen_BNS1, values_BNSH, 0), mask_BNTS)
