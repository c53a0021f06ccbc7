"""One training step and one evaluation step: pure functions of state and batch, no I/O.

Dim letters: A accumulation, B batch, T time.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from meshlm.core.sharding import Axes, copy_axes, current_rules, leave_out, spec, use_mesh
from meshlm.core.tree import PyTree, cast_floating, pytree
from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, init_params, weight_tree
from meshlm.model.transformer import Compute, hidden_states, summed_loss
from meshlm.optim import (
    OptimizerConfig,
    apply_updates,
    gradient_norm,
    learning_rate,
    make_optimizer,
)

# Losses by which a spike is judged, once there are half as many.
SPIKE_WINDOW = 128


@pytree
class TrainState:
    """Everything that a step changes."""

    step: Int[Array, ""]
    """Steps done, skipped ones included."""
    params: Params
    optimizer: PyTree
    skipped: Int[Array, ""]
    """Steps which changed nothing: their loss or gradient was not finite, or the loss a spike."""
    skipped_in_a_row: Int[Array, ""]
    recent_losses: Float[Array, "W"] | None
    """What a spike is judged by: inf where there is none yet. None where none is skipped."""


@pytree
class StepBatch:
    """The global batch of one step, split over the mesh by rows."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    """1 where the target counts."""
    segment_ids: Int[Array, "B T"] | None
    """The document each token belongs to; None lets a token see the whole window."""


class StepMetrics(NamedTuple):
    """What one step measured."""

    loss: Float[Array, ""]
    """Mean over the batch's tokens, in nats, z-loss included where it is on."""
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    micro_grad_square: Float[Array, ""]
    """Mean over the accumulated parts of the squared norm of each part's gradient, times the parts.

    With equal numbers of counted tokens that is the part's own mean gradient.
    """
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


class EvalSums(NamedTuple):
    """Sums over a batch, to be added up."""

    nll: Float[Array, ""]
    """Nats."""
    tokens: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """All that the compiled step depends on."""

    model: ModelConfig
    optimizer: OptimizerConfig
    compute: Compute = dataclasses.field(default_factory=Compute)
    accumulate: int = 1
    """Parts into which the batch is cut; their gradients are added."""
    z_loss: float = 0.0
    """Weight of the original's penalty on the log-sum-exp relative to the largest logit."""
    skip_spikes: float | None = None
    """Standard deviations above the mean of the last `SPIKE_WINDOW` losses from which on a step
    changes nothing; None skips none."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights are rounded to it before the passes, and gradients are of it and added up in it; the
    optimizer and its weights stay float32."""

    def make_optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer of this model's parameters."""
        return make_optimizer(self.optimizer, weight_tree(self.model))


def init_state(config: StepConfig, seed: int) -> TrainState:
    """Returns the state before the first step, drawn from `seed`; call it in a mesh, under jit."""
    return begin_state(config, init_params(config.model, jax.random.key(seed)))


def begin_state(config: StepConfig, params: PyTree) -> TrainState:
    """Returns the state before the first step from given parameters."""
    optimizer = config.make_optimizer()
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        optimizer=optimizer.init(params),
        skipped=zero,
        skipped_in_a_row=zero,
        recent_losses=(
            None if config.skip_spikes is None else jnp.full(SPIKE_WINDOW, jnp.inf, jnp.float32)
        ),
    )


def abstract_state(config: StepConfig, mesh: Mesh) -> TrainState:
    """Returns the state's `jax.ShapeDtypeStruct`s with their shardings on `mesh`; no memory."""
    with use_mesh(mesh, current_rules()):
        shapes = jax.eval_shape(lambda: init_state(config, 0))

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        split = PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

    return jax.tree.map(place, shapes)


def batch_loss(
    params: Params, batch: StepBatch, config: StepConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (the loss summed over the batch's tokens, their number)."""
    model, compute = config.model, config.compute
    x_BTD = hidden_states(params, model, batch.tokens, compute, batch.segment_ids)
    loss = summed_loss(params, x_BTD, batch.targets, batch.loss_mask, compute, config.z_loss)
    return loss, jnp.sum(batch.loss_mask)


def loss_and_grads(
    params: Params, batch: StepBatch, config: StepConfig
) -> tuple[Float[Array, ""], Params, Float[Array, ""]]:
    """Returns (mean loss, its float32 gradient, mean squared norm of the parts' own gradients)."""
    params = cast_floating(params, config.weight_dtype)
    count = jnp.maximum(jnp.sum(batch.loss_mask), 1.0)
    if config.accumulate == 1:
        loss, grads = jax.value_and_grad(_mean_loss)(params, batch, count, config)
        square = jnp.square(gradient_norm(config.optimizer, grads, weight_tree(config.model)))
    else:
        loss, grads, square = _accumulate(params, batch, count, config)
    return loss, cast_floating(grads, jnp.float32), square


def _mean_loss(
    params: Params, batch: StepBatch, count: Float[Array, ""], config: StepConfig
) -> Float[Array, ""]:
    return batch_loss(params, batch, config)[0] / count


def num_micro_batches(config: StepConfig) -> int:
    """Returns the number of gradients that are summed up, in the mesh that is entered.

    Where a batch is accumulated, each copy of the weights sums up those of its own rows.
    """
    return config.accumulate * _num_copies() if config.accumulate > 1 else 1


def _num_copies() -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in copy_axes())


def _accumulate(
    params: Params, batch: StepBatch, count: Float[Array, ""], config: StepConfig
) -> tuple[Float[Array, ""], Params, Float[Array, ""]]:
    """Returns what `loss_and_grads` does, a part of the batch at a time.

    Each copy of the weights sums up the gradients of its own rows, and the copies' sums are added
    once, after the last part.
    """
    copies = copy_axes()

    def gradient(params: Params, rows: StepBatch) -> tuple:
        loss, grads = jax.value_and_grad(_mean_loss)(params, rows, count, config)
        norm = gradient_norm(config.optimizer, grads, weight_tree(config.model))
        return loss, grads, jnp.square(norm)

    def of_every_copy(params: Params, rows: StepBatch) -> tuple:
        with leave_out(copies):
            return jax.vmap(gradient)(params, rows)

    parts = _cut(batch, config.accumulate)
    if not copies:
        loss, grads, square = _sum_over_parts(gradient, params, parts)
    else:
        params, parts = _give_each(params, copies), _deal(parts, copies)
        sums = _sum_over_parts(of_every_copy, params, parts)
        loss, grads, square = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    return loss, grads, square * num_micro_batches(config)


def _sum_over_parts(gradient: Callable[..., tuple], params: Params, parts: StepBatch) -> tuple:
    def add(sums: tuple, part: StepBatch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, sums, gradient(params, part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first)
    return jax.lax.scan(add, jax.tree.map(_zeros_like, shapes), parts)[0]


def _zeros_like(shape: jax.ShapeDtypeStruct) -> jax.Array:
    outside = jax.sharding.get_abstract_mesh().empty
    split = None if outside or shape.sharding is None else shape.sharding.spec
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=split)


def _cut(batch: StepBatch, parts: int) -> StepBatch:
    """Returns the batch as [A, B/A, T]; part a has rows a, A+a, ...: no row changes device."""

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def _deal(parts: StepBatch, copies: Axes) -> StepBatch:
    """Returns parts [A, B/A, T] as [A, C, B/A/C, T], C copies of the weights: each has its rows."""
    with leave_out(copies):
        split = PartitionSpec(None, copies, *(spec("batch", None) or ()))

    def deal(x: jax.Array) -> jax.Array:
        shape = (x.shape[0], _num_copies(), x.shape[1] // _num_copies(), x.shape[2])
        return jax.lax.reshape(x, shape, out_sharding=split)

    return jax.tree.map(deal, parts)


def _give_each(params: Params, copies: Axes) -> Params:
    """Returns the weights with a leading dim of copies, of which each device holds its own."""

    def give(x: jax.Array) -> jax.Array:
        split = PartitionSpec(copies, *jax.typeof(x).sharding.spec)
        return jnp.broadcast_to(x[None], (_num_copies(), *x.shape), out_sharding=split)

    return jax.tree.map(give, params)


def train_step(
    state: TrainState, batch: StepBatch, config: StepConfig
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one step, and what was measured.

    A loss or gradient that is not finite, or a loss that is a spike, leaves parameters and
    optimizer as they were.
    """
    grads: PyTree
    loss, grads, micro_square = loss_and_grads(state.params, batch, config)
    grad_norm = gradient_norm(config.optimizer, grads, weight_tree(config.model))
    rate = learning_rate(config.optimizer, state.step)
    optimizer = config.make_optimizer()
    params: PyTree = state.params
    updates, optimizer_state = optimizer.update(grads, state.optimizer, params)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    recent = state.recent_losses
    if recent is not None:
        good &= ~is_spike(loss, recent, config.skip_spikes or 0.0)
        # Spikes too: what lasts is none.
        recent = jnp.where(jnp.arange(SPIKE_WINDOW) == state.step % SPIKE_WINDOW, loss, recent)

    def keep_if_bad(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    skip = 1 - good.astype(jnp.int32)
    new = TrainState(
        step=state.step + 1,
        params=keep_if_bad(apply_updates(state.params, updates, rate), state.params),
        optimizer=keep_if_bad(optimizer_state, state.optimizer),
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
        recent_losses=recent,
    )
    metrics = StepMetrics(loss, grad_norm, micro_square, rate, new.skipped, new.skipped_in_a_row)
    return new, metrics


def is_spike(loss: Float[Array, ""], recent: Float[Array, "W"], sigmas: float) -> Bool[Array, ""]:
    """Returns whether a loss is far above those before it; of too few nothing is said."""
    known = jnp.isfinite(recent)
    count = jnp.maximum(jnp.sum(known), 1)
    mean = jnp.sum(jnp.where(known, recent, 0.0)) / count
    variance = jnp.sum(jnp.where(known, jnp.square(recent - mean), 0.0)) / count
    return (2 * count >= SPIKE_WINDOW) & (loss > mean + sigmas * jnp.sqrt(variance))


def eval_step(params: Params, batch: StepBatch, config: StepConfig) -> EvalSums:
    """Returns the summed negative log-likelihood of the batch's targets, and their number."""
    params = cast_floating(params, config.weight_dtype)
    return EvalSums(*batch_loss(params, batch, dataclasses.replace(config, z_loss=0.0)))


def compile_train_step(
    config: StepConfig,
) -> Callable[[TrainState, StepBatch], tuple[TrainState, StepMetrics]]:
    """Returns the jitted `train_step`; it takes the old state's memory for the new one."""
    return jax.jit(lambda state, batch: train_step(state, batch, config), donate_argnums=0)
