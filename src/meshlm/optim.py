"""AdamW as GPT-J was trained with it: clip, Adam, decay on matrices, warm-up and cosine anneal."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meshlm.core.errors import UsageError
from meshlm.core.tree import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Every knob of the optimizer; the learning rate is a function of the step alone."""

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

    def __post_init__(self) -> None:
        for name in ("learning_rate", "end_learning_rate", "weight_decay"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("clip_norm", "adam_epsilon"):
            _require(self, name, getattr(self, name) > 0, "a positive number")
        for name in ("warmup_steps", "anneal_steps"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
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


def make_optimizer(config: OptimizerConfig, decay_mask: PyTree) -> optax.GradientTransformation:
    """Returns the transformation of gradients into updates, before the factor -learning rate.

    Args:
        config: the knobs.
        decay_mask: a tree like the parameters, True where weight decay pulls.
    """
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(config.clip_norm)),
        (
            "adam",
            optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_epsilon),
        ),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=decay_mask)),
    )


def apply_updates(params: PyTree, updates: PyTree, rate: Float[Array, ""]) -> PyTree:
    """Returns params - rate x updates."""
    return jax.tree.map(lambda p, u: p - rate * u, params, updates)
