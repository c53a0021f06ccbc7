"""AdamW as GPT-J was trained with it: clip, Adam, decay on matrices, warm-up and cosine anneal.

Adafactor in its place has no moments as large as the weights: 8 bytes a parameter with the
gradient, where AdamW has 16.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meshlm.core.errors import UsageError
from meshlm.core.tree import PyTree
from meshlm.model.params import Weight

OptimizerName = Literal["adamw", "adafactor"]
# Adafactor's: matrices with both sides at least this long keep a mean of squares for each row and
# each column alone; an update's root mean square is cut to the limit; the mean of squares forgets
# by 1 - step ** -power. Source: Shazeer and Stern 2018 (arXiv:1804.04235), sections 4 to 7.
LEAST_FACTORED = 128
_UPDATE_RMS = 1.0
_FORGETTING_POWER = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Every knob of the optimizer; the learning rate is a function of the step alone."""

    name: OptimizerName = "adamw"
    """adafactor keeps no moments as large as the weights."""
    learning_rate: float
    """Peak, reached after the warm-up."""
    end_learning_rate: float
    """Reached after the anneal, and kept."""
    warmup_steps: int
    """Steps of linear rise from 0."""
    anneal_steps: int
    """Steps of the cosine's fall, counted after the warm-up."""
    weight_decay: float = 0.1
    """Pull on matrices towards 0, times the learning rate; biases and norms have none."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    adam_b1: float = 0.9
    """Decay of Adam's first moment."""
    adam_b2: float = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    bias_shares: int = 1
    """Shares in which the original keeps each bias that it sums over its shards, one a shard: it is
    counted so often in the gradient's norm, and moves so many times the learning rate. 1: whole."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "end_learning_rate", "weight_decay"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("clip_norm", "adam_epsilon"):
            _require(self, name, getattr(self, name) > 0, "a positive number")
        for name in ("warmup_steps", "anneal_steps"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "bias_shares", self.bias_shares >= 1, "1 or more")
        if self.name != "adamw":
            _require(self, "bias_shares", self.bias_shares == 1, f"1 with {self.name}")
        for name in ("adam_b1", "adam_b2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "0 or more and less than 1")


def _require(config: OptimizerConfig, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {getattr(config, name)}: give {wanted}")


def learning_rate(config: OptimizerConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Returns the learning rate of the update that `step` updates came before.

    Source: mesh-transformer-jax, util.py:16-26; the first update of a warm-up is at 0.
    """
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.clip(step / max(config.warmup_steps, 1), 0.0, 1.0) if config.warmup_steps else 1.0
    past = jnp.clip((step - config.warmup_steps) / max(config.anneal_steps, 1), 0.0, 1.0)
    fall = (config.learning_rate - config.end_learning_rate) * (1 - jnp.cos(jnp.pi * past)) / 2
    return jnp.asarray(warm * config.learning_rate - fall, jnp.float32)


def make_optimizer(config: OptimizerConfig, weights: PyTree) -> optax.GradientTransformation:
    """Returns the transformation of gradients into updates, before the factor -learning rate.

    Args:
        weights: a tree like the parameters, of `Weight`s.
    """
    decay = jax.tree.map(lambda weight: weight.decay, weights)
    return optax.named_chain(
        ("clip", optax.stateless(lambda grads, _: _clip(config, grads, weights))),
        *_scalings(config),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=decay)),
        ("shares", optax.stateless(lambda updates, _: _times_shares(config, updates, weights))),
    )


def _scalings(config: OptimizerConfig) -> tuple[tuple[str, optax.GradientTransformation], ...]:
    """Returns the named transformations that make an update of about 1 from a gradient."""
    if config.name == "adamw":
        adam = optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_epsilon)
        return (("adam", adam),)
    # Without the paper's factor of the weights' own size: the learning rates then are AdamW's.
    factored = optax.scale_by_factored_rms(
        decay_rate=_FORGETTING_POWER, min_dim_size_to_factor=LEAST_FACTORED
    )
    return (("adafactor", factored), ("update_clip", optax.clip_by_block_rms(_UPDATE_RMS)))


def _clip(config: OptimizerConfig, grads: PyTree, weights: PyTree) -> PyTree:
    norm, limit = gradient_norm(config, grads, weights), config.clip_norm
    return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm * limit), grads)


def _times_shares(config: OptimizerConfig, updates: PyTree, weights: PyTree) -> PyTree:
    def times(weight: Weight, update: jax.Array) -> jax.Array:
        shares = _shares(config, weight)
        return update if shares == 1 else update * shares

    return jax.tree.map(times, weights, updates)


def gradient_norm(config: OptimizerConfig, grads: PyTree, weights: PyTree) -> Float[Array, ""]:
    """Returns the global norm by which gradients are clipped.

    A bias in shares counts once a share, because each of them has the gradient of their sum.

    Args:
        weights: a tree like the gradients, of `Weight`s.

    Source: mesh-transformer-jax, util.py:29-33.
    """

    def square(weight: Weight, grad: jax.Array) -> jax.Array:
        return _shares(config, weight) * jnp.sum(jnp.square(grad.astype(jnp.float32)))

    leaves = jax.tree.leaves(weights)
    squares = jax.tree.leaves(jax.tree.map(square, weights, grads))
    # Python's sort keeps the tree's order among equals, and a sum depends on its order.
    order = sorted(range(len(leaves)), key=lambda i: leaves[i].normed_last)
    return jnp.sqrt(sum(squares[i] for i in order))


def _shares(config: OptimizerConfig, weight: Weight) -> int:
    return config.bias_shares if weight.shared else 1


def apply_updates(params: PyTree, updates: PyTree, rate: Float[Array, ""]) -> PyTree:
    """Returns params - rate x updates."""
    return jax.tree.map(lambda p, u: p - rate * u, params, updates)
