"""Prefill and decoding with a cache: the compiled functions, and the state between them.

Prompts are padded on the right; each row has its own length. A row's next token comes from `hidden`
at its last token, so a decoding step is: choose a token, then run it through the model. Several
steps are one dispatch. The shapes are those of `buckets.py`.

Dim letters: B rows, P rows of a prefill, T prompt length, S cache places, D model, V vocabulary
rows, K steps of a dispatch, A alternatives, E tokens that end a row.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meshlm.core.sharding import current_rules, reshard, use_mesh
from meshlm.core.tree import pytree
from meshlm.generation import sampling
from meshlm.generation.config import MAX_ALTERNATIVES
from meshlm.model.cache import Cache, init_cache
from meshlm.model.config import ModelConfig
from meshlm.model.params import Params, Weight, map_weights, unstack_blocks
from meshlm.model.transformer import Compute, forward_cached, unembed
from meshlm.ops.weights import as_matrix

# Steps of one dispatch. A loop costs less than its dispatches on small models.
MAX_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What compiled functions depend on besides the shapes of their arguments."""

    config: ModelConfig
    compute: Compute
    allowed_vocab: int
    """Ids from here on are padding of the vocabulary, in no prompt."""
    sampled_vocab: int
    """Ids from here on are never chosen."""
    filters_first: bool = False
    """The choice is limited before the temperature divides; see `sampling.process_logits`."""


@pytree
class DecodeState:
    """What stays on the devices between dispatches."""

    hidden: Float[Array, "B D"]
    """The final norm's output at each row's last token."""
    cache: Cache
    seen: Bool[Array, "B V"]
    """The tokens of each row's prompt and output."""


@pytree
class RowProgress:
    """How far each row is; the caller keeps it between dispatches."""

    positions: Int[Array, "B"]
    """The position of the next token."""
    remaining: Int[Array, "B"]
    """Tokens that may still come; 0: the row is done, and only computes along."""
    end_tokens: Int[Array, "B E"]
    """The tokens of which any ends the row; -1 is none."""


@pytree
class Steps:
    """What a dispatch chose, step by step; row b's entries count while the row is not done."""

    count: Int[Array, ""]
    tokens: Int[Array, "K B"]
    log_probs: Float[Array, "K B"]
    top_ids: Int[Array, "K B A"] | None
    top_log_probs: Float[Array, "K B A"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeModel:
    """Weights made ready for generation and scoring, and where they live."""

    params: Params
    """With one block a layer; see `prepare_params`."""
    shape: Shape
    mesh: jax.sharding.Mesh | None
    """None: the mesh that the caller has entered, or none at all."""

    @classmethod
    def prepare(
        cls,
        params: Params,
        config: ModelConfig,
        compute: Compute,
        *,
        allowed_vocab: int,
        sampled_vocab: int | None = None,
        filters_first: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "DecodeModel":
        """Returns the model, from stacked weights or from one block a layer; they stay as they are.

        Of blocks that are apart already, only what has to be cast is copied.

        Args:
            allowed_vocab: the tokenizer's size; ids from there on are padding.
            sampled_vocab: ids from there on are never chosen; all are allowed unless given.
            filters_first: see `sampling.process_logits`.
        """
        shape = Shape(
            config=config,
            compute=compute,
            allowed_vocab=allowed_vocab,
            sampled_vocab=allowed_vocab if sampled_vocab is None else sampled_vocab,
            filters_first=filters_first,
        )
        with _entered(mesh):
            if isinstance(params.blocks, tuple):
                ready = cast_matrices(config, params, compute.dtype)
            else:
                ready = prepare_params(params, shape=shape)
            return cls(params=ready, shape=shape, mesh=mesh)

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which the mesh is set."""
        return _entered(self.mesh)

    @property
    def batch_shards(self) -> int:
        """The number of parts into which rows are split; their number is a multiple of it."""
        mesh = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in current_rules().batch)


def _entered(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh, current_rules())


@functools.partial(jax.jit, static_argnames="shape")
def prepare_params(params: Params, *, shape: Shape) -> Params:
    """Returns the weights as decoding wants them: an array a layer, matrices in the compute dtype.

    Numbers stay those of `forward`, which casts the same weights at each use. The embedding and the
    vectors keep their type, for they are used in float32.
    """

    return cast_matrices(shape.config, unstack_blocks(params), shape.compute.dtype)


def cast_matrices(config: ModelConfig, params: Params, dtype: str) -> Params:
    """Returns weights with one block a layer, those of products in `dtype` if it is smaller."""

    def cast(weight: Weight, value: Any) -> Any:
        return as_matrix(value).narrowed(dtype) if "product" in weight.uses else value

    return map_weights(cast, config, params)


@functools.partial(jax.jit, static_argnames="shape")
def prefill(
    params: Params, tokens_PT: Int[Array, "P T"], lengths_P: Int[Array, "P"], *, shape: Shape
) -> tuple[Float[Array, "P D"], Cache]:
    """Returns the final norm's output at each prompt's last token, and a cache of T places."""
    tokens_PT = reshard(tokens_PT, "batch", None)
    x_PTD, cache = run_whole(params, tokens_PT, shape)
    last_P = reshard(lengths_P, "batch") - 1
    is_last_PT = jax.lax.broadcasted_iota(jnp.int32, (1, tokens_PT.shape[1]), 1) == last_P[:, None]
    return jnp.sum(jnp.where(is_last_PT[..., None], x_PTD, 0.0), axis=1), cache


def run_whole(
    params: Params, tokens_BT: Int[Array, "B T"], shape: Shape
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns the final norm's output for sequences from position 0, and their cache."""
    num_rows, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (num_rows, length))
    cache = init_cache(shape.config, num_rows, length, shape.compute.dtype)
    return forward_cached(
        params, shape.config, tokens_BT, reshard(positions_BT, "batch", None), cache, shape.compute
    )


@functools.partial(jax.jit, static_argnames=("num_places", "shape"))
def init_state(seen_BV: Bool[Array, "B V"], *, num_places: int, shape: Shape) -> DecodeState:
    """Returns the state of rows whose prompts are not placed yet."""
    num_rows = seen_BV.shape[0]
    return DecodeState(
        hidden=reshard(jnp.zeros((num_rows, shape.config.d_model)), "batch", None),
        cache=init_cache(shape.config, num_rows, num_places, shape.compute.dtype),
        seen=reshard(seen_BV, "batch", None),
    )


@functools.partial(jax.jit, donate_argnums=0)
def place(
    state: DecodeState, hidden_PD: Float[Array, "P D"], cache: Cache, source_B: Int[Array, "B"]
) -> DecodeState:
    """Returns the state with row b taken from a prefill's row `source_B[b]`, if not -1."""
    source_B = reshard(source_B, "batch")

    def take(old: jax.Array, part: jax.Array) -> jax.Array:
        split = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(old).sharding.spec
        new = part.at[jnp.maximum(source_B, 0)].get(out_sharding=split)
        if old.ndim == 4:
            new = jnp.pad(new, ((0, 0), (0, 0), (0, old.shape[2] - new.shape[2]), (0, 0)))
        is_new = (source_B >= 0).reshape(-1, *([1] * (old.ndim - 1)))
        return jnp.where(is_new, new, old)

    return dataclasses.replace(
        state,
        hidden=take(state.hidden, hidden_PD),
        cache=jax.tree.map(take, state.cache, cache),
    )


@functools.partial(jax.jit, static_argnames=("alternatives", "shape"), donate_argnums=1)
def decode(
    params: Params,
    state: DecodeState,
    progress: RowProgress,
    options: sampling.RowOptions,
    num_steps: Int[Array, ""],
    *,
    alternatives: bool,
    shape: Shape,
) -> tuple[DecodeState, Steps]:
    """Returns the state after up to `num_steps` (at most MAX_STEPS) tokens a row, and the tokens.

    It ends early where all rows are done.
    """
    progress, options = jax.tree.map(
        lambda x: reshard(x, "batch", *([None] * (x.ndim - 1))), (progress, options)
    )

    def go_on(carry: tuple[DecodeState, RowProgress, Steps]) -> jax.Array:
        _, progress, steps = carry
        return (steps.count < num_steps) & jnp.any(progress.remaining > 0)

    def body(
        carry: tuple[DecodeState, RowProgress, Steps],
    ) -> tuple[DecodeState, RowProgress, Steps]:
        state, progress, steps = carry
        logits_BV = next_logits(params, state, shape)
        scores_BV = sampling.process_logits(
            logits_BV, state.seen, options, shape.sampled_vocab, shape.filters_first
        )
        tokens_B = sampling.draw(scores_BV, options, progress.positions)
        steps = _record(steps, logits_BV, tokens_B, shape)
        return _feed(params, state, progress, tokens_B, shape), _advance(progress, tokens_B), steps

    start = (state, progress, _no_steps(progress.positions.shape[0], alternatives))
    state, _, steps = jax.lax.while_loop(go_on, body, start)
    return state, jax.tree.map(lambda x: reshard(x, *([None] * x.ndim)), steps)


def next_logits(params: Params, state: DecodeState, shape: Shape) -> Float[Array, "B V"]:
    """Returns the raw float32 logits of each row's next token, whole along the vocabulary."""
    logits_B1V = unembed(params, state.hidden[:, None], shape.compute)
    return reshard(logits_B1V[:, 0], "batch", None)


def _feed(
    params: Params, state: DecodeState, progress: RowProgress, tokens_B: jax.Array, shape: Shape
) -> DecodeState:
    # A row that is done may stand one past the last place; what it computes is not looked at.
    positions_B = jnp.minimum(progress.positions, state.cache.num_places - 1)
    x_B1D, cache = forward_cached(
        params, shape.config, tokens_B[:, None], positions_B[:, None], state.cache, shape.compute
    )
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, state.seen.shape[1]), 1)
    seen_BV = state.seen | (ids == tokens_B[:, None])
    return DecodeState(hidden=x_B1D[:, 0], cache=cache, seen=seen_BV)


def _advance(progress: RowProgress, tokens_B: jax.Array) -> RowProgress:
    is_active_B = progress.remaining > 0
    is_end_B = jnp.any(tokens_B[:, None] == progress.end_tokens, axis=1)
    goes_on_B = is_active_B & ~is_end_B
    return dataclasses.replace(
        progress,
        positions=progress.positions + is_active_B.astype(jnp.int32),
        remaining=jnp.where(goes_on_B, progress.remaining - 1, 0),
    )


def _no_steps(num_rows: int, alternatives: bool) -> Steps:
    def zeros(dtype: Any, *more: int) -> jax.Array:
        dims = (None, "batch", *(None for _ in more))
        return reshard(jnp.zeros((MAX_STEPS, num_rows, *more), dtype), *dims)

    return Steps(
        count=jnp.zeros((), jnp.int32),
        tokens=zeros(jnp.int32),
        log_probs=zeros(jnp.float32),
        top_ids=zeros(jnp.int32, MAX_ALTERNATIVES) if alternatives else None,
        top_log_probs=zeros(jnp.float32, MAX_ALTERNATIVES) if alternatives else None,
    )


def _record(steps: Steps, logits_BV: jax.Array, tokens_B: jax.Array, shape: Shape) -> Steps:
    log_probs_BV = sampling.log_probs(logits_BV)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(old, new, steps.count, 0)

    recorded = dataclasses.replace(
        steps,
        count=steps.count + 1,
        tokens=put(steps.tokens, tokens_B),
        log_probs=put(steps.log_probs, sampling.pick(log_probs_BV, tokens_B)),
    )
    if steps.top_ids is None or steps.top_log_probs is None:
        return recorded
    top_BA, ids_BA = sampling.most_probable(log_probs_BV, shape.sampled_vocab, MAX_ALTERNATIVES)
    return dataclasses.replace(
        recorded,
        top_ids=put(steps.top_ids, ids_BA),
        top_log_probs=put(steps.top_log_probs, top_BA),
    )


def pad_rows(rows: list[list[int]], num_rows: int, length: int) -> np.ndarray:
    """Returns token rows [num_rows, length] of int32, padded on the right and below with 0."""
    padded = np.zeros((num_rows, length), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
