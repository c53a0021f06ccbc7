"""The original's training step, written once more against today's JAX to be compared with.

Its algorithm, its types and its communication: every device is one of S shards of a copy of the
model, and the copies split the batch. A copy's state, Adam's moments included, is split over its
own shards alone. Weights are rounded to bfloat16; an embedding is a product with one-hot rows in
float32, and so are the residual stream, every product, attention's dense scores and every sum over
shards of float32. The vocabulary of embedding and head is split over the shards and its loss too.
The layers are unrolled; embedding, each layer and head are computed again in the backward pass,
and with a layer its sum over shards, which that program of 2021 did and today's `jax.checkpoint`
would leave out. Gradients are added up in bfloat16 over the accumulated parts, a sequence each,
and then averaged over the copies.

Dim letters: S shards, R copies, A accumulated parts, T time, D model, N heads of a shard, H head
dim, F feed-forward of a shard, V vocabulary rows of a shard.

Source: mesh-transformer-jax f8315e3, layers.py, transformer_shard.py, util.py, device_train.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshlm.core.config import from_dict, to_dict
from meshlm.core.sharding import make_mesh, use_mesh
from meshlm.model.config import ModelConfig
from meshlm.ops.rotary import rotary_table
from meshlm.optim import OptimizerConfig, learning_rate
from meshlm.planning import worker
from meshlm.planning.compiling import Compiled, run_worker
from meshlm.planning.setup import Setup, check_setup
from meshlm.planning.topology import Topology

Tree = Any
COPIES = ("replica", "data")
SHARDS = "model"
MASKED = -1e10
Z_LOSS = 1e-4
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalStep:
    """All that the step depends on, besides the mesh."""

    model: ModelConfig
    optimizer: OptimizerConfig
    dtype: str = "bfloat16"
    """Of the weights in the passes and of their gradients; float32 only to compare numbers."""


def shapes(model: ModelConfig, shards: int) -> Tree:
    """The shapes of all weights, the shards along their first dim, in the original's own order.

    JAX walks the tree by names as strings, so `layer_10` before `layer_2`, `b` before `w`.
    """
    D, heads = model.d_model, model.num_heads * model.head_dim // shards
    F, V = model.d_ff // shards, model.vocab_size // shards

    def linear(rows: int, columns: int, bias: bool = True) -> Tree:
        weight = {"w": (shards, rows, columns)}
        return weight | ({"b": (shards, columns)} if bias else {})

    norm = {"offset": (shards, D), "scale": (shards, D)}
    layer = {
        "linear": linear(D, heads, bias=False),
        "linear_1": linear(D, heads, bias=False),
        "linear_2": linear(D, heads, bias=False),
        "linear_3": linear(heads, D, bias=False),
        "linear_4": linear(D, F),
        "linear_5": linear(F, D),
        "norm": norm,
    }
    layers = {f"layer_{i}": layer for i in range(model.num_layers)}
    ends = {"embedding": linear(V, D), "projection": {"linear": linear(D, V), "norm": norm}}
    return ends | layers


def begin_state(params: Tree) -> Tree:
    """The state before the first step, for weights with their shards along the first dim."""
    shards = jax.tree.leaves(params)[0].shape[0]
    count = jnp.zeros((shards,), jnp.int32)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    adam = optax.ScaleByAdamState(count=count, mu=zeros(params), nu=zeros(params))
    return {"opt_state": {"adam": adam, "schedule": count}, "params": params, "step": count}


def abstract_state(config: OriginalStep, mesh: Mesh) -> Tree:
    """The state's shapes with their shardings on `mesh`: each copy has all of it."""
    where = NamedSharding(mesh, PartitionSpec(SHARDS))
    wanted = shapes(config.model, mesh.shape[SHARDS])
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        wanted,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(begin_state, params)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of tokens and targets [R, A, T]: a copy has its own sequences."""
    return NamedSharding(mesh, PartitionSpec(COPIES))


# Sums over the shards, by hand: entering a layer costs one backward, leaving it one forward.


@jax.custom_vjp
def enter(x: jax.Array) -> jax.Array:
    """x itself; its gradient is summed over the shards."""
    return x


enter.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, SHARDS),))


@jax.custom_vjp
def leave(x: jax.Array) -> jax.Array:
    """x summed over the shards; its gradient passes as it is."""
    return jax.lax.psum(x, SHARDS)


leave.defvjp(lambda x: (leave(x), None), lambda _, g: (g,))


def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, all of it computed again in the backward pass: its sum over shards too."""

    @jax.custom_vjp
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return function(*arguments), arguments

    def backward(arguments: Any, gradient: Any) -> Any:
        # The barrier keeps the first computation from being taken for the second.
        arguments, gradient = jax.lax.optimization_barrier((arguments, gradient))
        again, pull = jax.vjp(function, *arguments)
        # Nobody needs the result: unless it is tied to the gradient it is not computed.
        return pull(gradient + 0.0 * again)

    call.defvjp(forward, backward)
    return call


# The model, as one shard of it sees one sequence.


def linear(x: jax.Array, weight: Tree) -> jax.Array:
    """x times the weight, of float32, for x is."""
    y = x @ weight["w"]
    return y + weight["b"][None] if "b" in weight else y


def norm(x_TD: jax.Array, weight: Tree) -> jax.Array:
    """x normed over D with the first shard's scale and offset, which the others ask it for."""
    scale_D, offset_D = (
        jax.lax.all_gather(weight[name], SHARDS)[0] for name in ("scale", "offset")
    )
    centred = x_TD - jnp.mean(x_TD, axis=-1, keepdims=True)
    variance = jnp.var(x_TD, axis=-1, keepdims=True)
    return scale_D[None] * jax.lax.rsqrt(variance + EPSILON) * centred + offset_D[None]


def one_hot(tokens_T: jax.Array, rows: int) -> jax.Array:
    """A float32 row a token, all zeros where the token is another shard's."""
    first = jax.lax.axis_index(SHARDS) * rows
    return jax.nn.one_hot(tokens_T - first, rows, dtype=jnp.float32)


def embed(tokens_T: jax.Array, weight: Tree) -> jax.Array:
    return leave(linear(one_hot(tokens_T, weight["w"].shape[0]), weight))


def rotate(x_TNH: jax.Array, model: ModelConfig) -> jax.Array:
    sin, cos = (
        jnp.repeat(table[: x_TNH.shape[0], None], 2, axis=-1)
        for table in rotary_table(model.context_length, model.rotary_dim)
    )
    turned, passed = jnp.split(x_TNH, [model.rotary_dim], axis=-1)
    across = jnp.stack([-turned[..., 1::2], turned[..., 0::2]], axis=-1).reshape(turned.shape)
    return jnp.concatenate([turned * cos + across * sin, passed], axis=-1)


def attend(q_TNH: jax.Array, k_TNH: jax.Array, v_TNH: jax.Array) -> jax.Array:
    length, _, head_dim = q_TNH.shape
    scores_NTS = jnp.einsum("TNH,SNH->NTS", q_TNH, k_TNH) / np.float32(np.sqrt(head_dim))
    seen = jnp.tril(jnp.ones((length, length), jnp.float32))
    weights_NTS = jax.nn.softmax(scores_NTS + (MASKED * (1.0 - seen))[None], axis=-1)
    return jnp.einsum("NTS,SNH->TNH", weights_NTS, v_TNH)


def layer(x_TD: jax.Array, weight: Tree, model: ModelConfig) -> jax.Array:
    """What a layer adds to the stream: attention and feed-forward beside it, and one sum."""
    x_TD = norm(enter(x_TD), weight["norm"])
    q_TNH, v_TNH, k_TNH = (
        linear(x_TD, weight[name]).reshape(len(x_TD), -1, model.head_dim)
        for name in ("linear", "linear_1", "linear_2")
    )
    mixed_TNH = attend(rotate(q_TNH, model), rotate(k_TNH, model), v_TNH)
    attention_TD = linear(mixed_TNH.reshape(len(x_TD), -1), weight["linear_3"])
    hidden_TF = jax.nn.gelu(linear(x_TD, weight["linear_4"]))
    return leave(attention_TD + linear(hidden_TF, weight["linear_5"]))


def head_loss(x_TD: jax.Array, weight: Tree, targets_T: jax.Array) -> jax.Array:
    """The sequence's mean loss with the z-loss; the logits stay with their shards."""
    logits_TV = linear(norm(enter(x_TD), weight["norm"]), weight["linear"])
    top_T1 = jnp.max(jax.lax.stop_gradient(logits_TV), axis=-1, keepdims=True)
    logits_TV -= jax.lax.pmax(top_T1, SHARDS)
    label_T = leave(jnp.sum(one_hot(targets_T, logits_TV.shape[1]) * logits_TV, axis=-1))
    log_sum_T = jnp.log(leave(jnp.sum(jnp.exp(logits_TV), axis=-1)))
    return jnp.mean(log_sum_T - label_T) + jnp.mean(Z_LOSS * jnp.square(log_sum_T))


def loss_of(params: Tree, tokens_T: jax.Array, targets_T: jax.Array, model: ModelConfig):
    """The mean loss of one sequence."""
    x_TD = jax.checkpoint(embed)(tokens_T, params["embedding"])
    block = repeated(lambda x, weight: layer(x, weight, model))
    for i in range(model.num_layers):
        x_TD = x_TD + block(x_TD, params[f"layer_{i}"])
    return jax.checkpoint(head_loss)(x_TD, params["projection"], targets_T)


# The step, as one device sees it.


def summed_grads(
    params: Tree, tokens_AT: jax.Array, targets_AT: jax.Array, config: OriginalStep
) -> tuple[jax.Array, Tree]:
    """The parts' losses, and their gradients' sum averaged over the copies, in `config.dtype`."""
    rounded = jax.tree.map(lambda x: x.astype(config.dtype), params)

    def part(total: Tree, batch: tuple[jax.Array, jax.Array]) -> tuple[Tree, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(rounded, *batch, config.model)
        return jax.tree.map(jnp.add, total, grads), loss

    zeros = jax.tree.map(jnp.zeros_like, rounded)
    grads, losses_A = jax.lax.scan(part, zeros, (tokens_AT, targets_AT))
    return losses_A, jax.tree.map(lambda g: jax.lax.pmean(g, COPIES), grads)


def shard_norm(grads: Tree) -> jax.Array:
    """The gradient's norm over all shards, added up in the gradient's own type."""
    square = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))
    return jnp.sqrt(jax.lax.psum(square, SHARDS))


def update(state: Tree, grads: Tree, length: jax.Array, config: OriginalStep) -> Tree:
    """The state after one step of AdamW, on gradients of this norm that are clipped by it."""
    knobs, adam = config.optimizer, state["opt_state"]["adam"]
    clipped = jax.tree.map(
        lambda g: jnp.where(length < knobs.clip_norm, g, g / length * knobs.clip_norm), grads
    )
    rule = optax.scale_by_adam(b1=knobs.adam_b1, b2=knobs.adam_b2, eps=knobs.adam_epsilon)
    updates, adam = rule.update(clipped, adam)
    rate = learning_rate(knobs, state["opt_state"]["schedule"])

    def move(weight: jax.Array, change: jax.Array) -> jax.Array:
        decay = knobs.weight_decay * weight if weight.ndim > 1 else 0.0
        return weight - rate * (change + decay)

    return {
        "opt_state": {"adam": adam, "schedule": state["opt_state"]["schedule"] + 1},
        "params": jax.tree.map(move, state["params"], updates),
        "step": state["step"] + 1,
    }


def train_step(
    state: Tree, tokens_RAT: jax.Array, targets_RAT: jax.Array, config: OriginalStep
) -> tuple[Tree, jax.Array, jax.Array]:
    """The state after one step, the losses [R, A], and the gradient's norm as it was clipped by.

    Call it under `jit` on a mesh with as many copies as the tokens have rows.
    """

    def on_device(state: Tree, tokens_RAT: jax.Array, targets_RAT: jax.Array):
        state = jax.tree.map(lambda x: x[0], state)
        losses_A, grads = summed_grads(state["params"], tokens_RAT[0], targets_RAT[0], config)
        scaled = jax.tree.map(lambda g: g / tokens_RAT.shape[1], grads)
        length = shard_norm(scaled)
        new = update(state, scaled, length, config)
        return jax.tree.map(lambda x: x[None], new), losses_A[None], length

    shards, copies = PartitionSpec(SHARDS), PartitionSpec(COPIES)
    return jax.shard_map(
        on_device,
        in_specs=(shards, copies, copies),
        out_specs=(shards, copies, PartitionSpec()),
        check_vma=False,
    )(state, tokens_RAT, targets_RAT)


def compile_step(config: OriginalStep) -> Any:
    """The jitted step; it takes the old state's memory for the new one."""
    return jax.jit(
        lambda state, tokens, targets: train_step(state, tokens, targets, config), donate_argnums=0
    )


# The compiler's word on it: the same questions as MeshLM's own step is asked, in the same way.


def compile_original(setup: Setup, topology: Topology, timeout_s: float = 3600) -> Compiled:
    """What the compiler says of the original's step; `setup` has its mesh, parts and batch.

    Raises:
        UsageError: the batch is not one sequence a copy and part.
        MeshLMError: the compiler failed.
    """
    check_setup(setup)
    assert setup.rows == 1, "the original has one sequence a copy and part"
    request = {"setup": to_dict(setup), "topology": topology.name}
    return run_worker((__file__,), request, topology, timeout_s)


def lower_step(setup: Setup, devices: list[Any]) -> jax.stages.Lowered:
    """The step, traced and lowered for these devices."""
    config = OriginalStep(model=setup.step.model, optimizer=setup.step.optimizer)
    mesh = make_mesh(setup.mesh, devices)
    parts = setup.step.accumulate
    shape = (setup.batch_size // parts, parts, setup.seq_len)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    with use_mesh(mesh):
        return compile_step(config).lower(abstract_state(config, mesh), tokens, tokens)


def _compile_request(request: dict[str, Any]) -> Compiled:
    setup = from_dict(Setup, request["setup"], "setup")
    devices = worker.target_devices(request["topology"])
    return worker.compile_program(
        lambda: lower_step(setup, devices), setup.mesh, devices[0].platform
    )


if __name__ == "__main__":
    worker.answer_with(_compile_request)
