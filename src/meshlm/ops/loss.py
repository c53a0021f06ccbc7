"""Cross-entropy over the vocabulary, with the original's z-loss as an option.

Dim letters: B batch, T time, D model, V vocabulary rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLoss(NamedTuple):
    """Per token: the negative log-likelihood in nats, and the z penalty before its weight."""

    nll_BT: Float[Array, "B T"]
    z_BT: Float[Array, "B T"]


def token_loss(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> TokenLoss:
    """Returns the loss of every token from its float32 logits.

    The maximum is a constant to the gradient, and the z penalty is the squared log-sum-exp
    relative to it, as the original has it. The label's logit is a sum against a one-hot, which
    stays local where the vocabulary is split.

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
