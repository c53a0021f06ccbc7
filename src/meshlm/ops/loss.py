"""Cross-entropy over the vocabulary, with mesh-transformer-jax's z-loss as an option.

Dim letters: B batch, T time, D model, V vocabulary rows, M rows (batch and time flattened),
C rows of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import shards_of, share
from meshlm.ops.cpu import xla
from meshlm.ops.weights import Dense

# On one CPU the logits of so many tokens exist at a time.
CHUNK_ROWS = 512
# Elsewhere sequences are cut into stretches of consecutive tokens, and the logits of one stretch
# exist at a time: on each device those of so many tokens, with which products reach full speed.
STRETCH_ROWS = 1024
# The most stretches of a sequence: each is compiled separately.
MAX_STRETCHES = 8


class TokenLoss(NamedTuple):
    """Per token: the negative log-likelihood in nats, and the z penalty before its weight."""

    nll_BT: Float[Array, "B T"]
    z_BT: Float[Array, "B T"]


def token_loss(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> TokenLoss:
    """Returns the loss of every token from its float32 logits.

    The maximum has no gradient, and the z penalty is the squared log-sum-exp relative to it, as in
    mesh-transformer-jax. The label's logit is a sum against a one-hot, which stays local where the
    vocabulary is split.

    Source: mesh-transformer-jax, layers.py:569-593.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    top_BT = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1))
    shifted_BTV = logits_BTV - top_BT[..., None]
    log_sum_BT = jnp.log(jnp.sum(jnp.exp(shifted_BTV), axis=-1))
    vocab = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    is_target = vocab == targets_BT[..., None]
    label_BT = jnp.sum(jnp.where(is_target, shifted_BTV, 0.0), axis=-1)
    return TokenLoss(log_sum_BT - label_BT, jnp.square(log_sum_BT))


def head_loss(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    z_loss: float,
) -> Float[Array, ""]:
    """Returns the loss summed over the tokens, each multiplied by its mask, from the head's input.

    Args:
        x_BTD: the final norm's output, in the dtype of the products.
        head_VD: cast to the dtype of x for the products; gradients are summed in its own dtype.
        bias_V: float32.
        targets_BT: the tokens to predict.
        mask_BT: 1 where a token counts.
        z_loss: weight of the z penalty.
    """
    if xla.is_faster(x_BTD.dtype):
        head_VD = head_VD.astype(x_BTD.dtype)
        rows = (x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1), mask_BT.reshape(-1))
        return _chunked_loss(z_loss, rows[0], head_VD, bias_V, rows[1], rows[2])
    return _stretched_loss(x_BTD, head_VD, bias_V, targets_BT, mask_BT, z_loss)


def plain_head_loss(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    bias_V: Float[Array, "V"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    z_loss: float,
) -> Float[Array, ""]:
    """Returns what `head_loss` does, from all logits at once, on any device and mesh."""
    logits_BTV = Dense(head_VD.astype(x_BTD.dtype)).plain_dot(x_BTD) + bias_V[None, None]
    loss = token_loss(logits_BTV, targets_BT)
    return jnp.sum((loss.nll_BT + z_loss * loss.z_BT) * mask_BT)


def _stretched_loss(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    bias_V: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    z_loss: float,
) -> jax.Array:
    """Returns what `head_loss` does, on any mesh, one stretch of every sequence at a time.

    The logits are computed again in the backward pass. The gradients of the head and of x are
    summed on each device first and over devices once. The loop is unrolled: in a scan JAX cannot
    make such sums together with those over copies of the weights.
    """
    num_rows, length = x_BTD.shape[0] // shards_of("batch"), x_BTD.shape[1]
    stretch = max(-(-length // MAX_STRETCHES), STRETCH_ROWS // num_rows, 1)
    if stretch >= length:
        return plain_head_loss(x_BTD, head_VD, bias_V, targets_BT, mask_BT, z_loss)
    x_BTD, head_VD = share(x_BTD, "vocab"), share(head_VD, "batch")
    part_loss = jax.checkpoint(functools.partial(plain_head_loss, z_loss=z_loss))
    total = jnp.zeros(())
    for start in range(0, length, stretch):
        part = (x[:, start : start + stretch] for x in (x_BTD, targets_BT, mask_BT))
        x_BCD, targets_BC, mask_BC = part
        # Orders the stretches, in the backward pass too: else the logits of all exist together.
        x_BCD, total = jax.lax.optimization_barrier((x_BCD, total))
        total += part_loss(x_BCD, head_VD, bias_V, targets_BC, mask_BC)
    return total


# On one CPU the forward pass computes the gradient too, one chunk of rows at a time, while the
# logits of the chunk exist: they are computed once.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(
    z_loss: float,
    x_MD: jax.Array,
    head_VD: jax.Array,
    bias_V: jax.Array,
    targets_M: jax.Array,
    mask_M: jax.Array,
) -> jax.Array:
    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_CD, targets_C, mask_C = chunk
        logits_CV = xla.product(x_CD, head_VD, 1, 1) + bias_V[None]
        loss = token_loss(logits_CV[None], targets_C[None])
        return total + jnp.sum((loss.nll_BT + z_loss * loss.z_BT)[0] * mask_C), None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(x_MD, targets_M, mask_M))[0]


def _chunks(*rows: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays [M, ...] as [M/C, C, ...], padded with zeros, which the mask excludes."""
    size = min(CHUNK_ROWS, rows[0].shape[0])
    missing = -rows[0].shape[0] % size

    def cut(a: jax.Array) -> jax.Array:
        filled = jnp.pad(a, ((0, missing), *((0, 0) for _ in a.shape[1:])))
        return filled.reshape(-1, size, *a.shape[1:])

    return tuple(map(cut, rows))


def _chunked_forward(
    z_loss: float,
    x_MD: jax.Array,
    head_VD: jax.Array,
    bias_V: jax.Array,
    targets_M: jax.Array,
    mask_M: jax.Array,
) -> tuple[jax.Array, Any]:
    def add(carry: tuple[jax.Array, ...], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, dhead_DV, dbias_V = carry
        x_CD, targets_C, mask_C = chunk
        logits_CV = xla.product(x_CD, head_VD, 1, 1) + bias_V[None]
        loss, g_CV = _loss_and_gradient(logits_CV, targets_C, mask_C, z_loss)
        g_CV = jax.lax.optimization_barrier(g_CV.astype(x_CD.dtype))
        dx_CD = xla.product(g_CV, head_VD, 1, 0).astype(x_CD.dtype)
        dhead_DV += xla.product(xla.transpose(x_CD), g_CV, 1, 0)
        return (total + loss, dhead_DV, dbias_V + xla.column_sum(g_CV)), dx_CD

    zeros_DV = jnp.zeros(head_VD.shape[::-1], jnp.float32)
    start = (jnp.zeros(()), zeros_DV, jnp.zeros(bias_V.shape, jnp.float32))
    chunks = _chunks(x_MD, targets_M, mask_M)
    (total, dhead_DV, dbias_V), dx_CD = jax.lax.scan(add, start, chunks)
    dhead_VD = xla.transpose(dhead_DV).astype(head_VD.dtype)
    dx_MD = dx_CD.reshape(-1, x_MD.shape[1])[: x_MD.shape[0]]
    return total, (dx_MD, dhead_VD, dbias_V)


def _loss_and_gradient(
    logits_CV: jax.Array, targets_C: jax.Array, mask_C: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the summed loss of a chunk, and its gradient with respect to the logits, float32."""
    top_C1 = jnp.max(logits_CV, axis=-1, keepdims=True)
    log_sum_C1 = jnp.log(jnp.sum(jnp.exp(logits_CV - top_C1), axis=-1, keepdims=True))
    vocab = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
    is_target = vocab == targets_C[:, None]
    label_C = jnp.sum(jnp.where(is_target, logits_CV, 0.0), axis=-1)
    nll_C = (top_C1 + log_sum_C1)[:, 0] - label_C
    loss = jnp.sum((nll_C + z_loss * jnp.square(log_sum_C1[:, 0])) * mask_C)
    weights_CV = jnp.exp(logits_CV - (top_C1 + log_sum_C1)) * (1 + 2 * z_loss * log_sum_C1)
    return loss, (weights_CV - is_target) * mask_C[:, None]


def _chunked_backward(z_loss: float, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    dx_MD, dhead_VD, dbias_V = ((g * d).astype(d.dtype) for d in saved)
    return dx_MD, dhead_VD, dbias_V, None, None


_chunked_loss.defvjp(_chunked_forward, _chunked_backward)
