"""The compiled functions of the server, and the arrays that stay on the device between them.

A prompt runs alone, in chunks, into a cache of its own (`prefill`). Its first token is chosen
(`choose`), and its cache is copied into a row of the batch (`put`), which runs one token a row at a
time (`decode`).

Dim letters: R rows of the batch, B rows (R, or 1 in prefill), C tokens of a chunk, S cache places,
D model, V vocabulary rows, A alternatives.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meshlm.core.sharding import reshard
from meshlm.core.tree import pytree
from meshlm.generation import sampling
from meshlm.generation.config import MAX_ALTERNATIVES
from meshlm.generation.decode import Shape
from meshlm.model.cache import Cache, init_cache
from meshlm.model.params import Params
from meshlm.model.transformer import forward_cached, unembed


@pytree
class Batch:
    """What the rows of the batch keep on the device."""

    cache: Cache
    seen: Bool[Array, "R V"]
    """The tokens of each row's prompt."""
    counts: Int[Array, "R V"]
    """How often each row's output has each token, but for the last one."""
    bias: Float[Array, "R V"]


@pytree
class RowSettings:
    """What each row's request asks for."""

    options: sampling.RowOptions
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    has_bias: Bool[Array, "B"]


@pytree
class Choice:
    """The token that was chosen for each row, and how probable it and the best were."""

    tokens: Int[Array, "B"]
    log_probs: Float[Array, "B"]
    top_ids: Int[Array, "B A"]
    top_log_probs: Float[Array, "B A"]


@functools.partial(jax.jit, static_argnames="shape", donate_argnums=1)
def prefill(
    params: Params,
    cache: Cache,
    tokens_1C: Int[Array, "1 C"],
    start: Int[Array, ""],
    last: Int[Array, ""],
    *,
    shape: Shape,
) -> tuple[Cache, Float[Array, "1 C D"], Float[Array, "1 D"]]:
    """Returns the cache with a chunk's keys and values, its hidden states and that of `last`."""
    positions_1C = start + jnp.arange(tokens_1C.shape[1], dtype=jnp.int32)[None]
    # Padding may reach beyond the context, where there are no rotary angles.
    positions_1C = jnp.minimum(positions_1C, shape.config.context_length - 1)
    tokens_1C, positions_1C = (reshard(x, "batch", None) for x in (tokens_1C, positions_1C))
    x_1CD, cache = forward_cached(
        params, shape.config, tokens_1C, positions_1C, cache, shape.compute
    )
    is_last_C = jnp.arange(tokens_1C.shape[1]) == last
    return cache, x_1CD, jnp.sum(jnp.where(is_last_C[None, :, None], x_1CD, 0.0), axis=1)


@functools.partial(jax.jit, static_argnames="shape")
def score(
    params: Params, x_1CD: Float[Array, "1 C D"], next_C: Int[Array, "C"], *, shape: Shape
) -> Choice:
    """Returns how probable each next token of a chunk is, and which ones are most probable."""
    logits_CV = _logits(params, x_1CD, shape)[0]
    return _tell(logits_CV, next_C, shape)


@functools.partial(jax.jit, static_argnames="shape")
def choose(
    params: Params,
    hidden_BD: Float[Array, "B D"],
    seen_BV: Bool[Array, "B V"],
    counts_BV: Int[Array, "B V"],
    bias_BV: Float[Array, "B V"],
    settings: RowSettings,
    positions_B: Int[Array, "B"],
    *,
    shape: Shape,
) -> Choice:
    """Returns the next token of each row.

    Args:
        positions_B: the position that it takes.
    """
    logits_BV = _logits(params, hidden_BD[:, None], shape)[:, 0]
    adjustments = sampling.Adjustments(
        presence=settings.presence,
        frequency=settings.frequency,
        counts=counts_BV,
        bias=bias_BV,
        has_bias=settings.has_bias,
    )
    scores_BV = sampling.process_logits(
        logits_BV,
        seen_BV | (counts_BV > 0),
        settings.options,
        shape.sampled_vocab,
        shape.filters_first,
        adjustments,
    )
    return _tell(logits_BV, sampling.draw(scores_BV, settings.options, positions_B), shape)


@functools.partial(jax.jit, static_argnames="shape", donate_argnums=1)
def decode(
    params: Params,
    batch: Batch,
    tokens_R: Int[Array, "R"],
    positions_R: Int[Array, "R"],
    settings: RowSettings,
    *,
    shape: Shape,
) -> tuple[Batch, Choice]:
    """Returns the batch after running each row's last token, and each row's next token.

    Args:
        positions_R: the position of the token that is run.
    """
    tokens_R, positions_R, settings = jax.tree.map(
        lambda x: reshard(x, "batch"), (tokens_R, positions_R, settings)
    )
    x_R1D, cache = forward_cached(
        params,
        shape.config,
        tokens_R[:, None],
        positions_R[:, None],
        batch.cache,
        shape.compute,
    )
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, batch.counts.shape[1]), 1)
    counts_RV = batch.counts + (ids == tokens_R[:, None])
    choice = choose(
        params,
        x_R1D[:, 0],
        batch.seen,
        counts_RV,
        batch.bias,
        settings,
        positions_R + 1,
        shape=shape,
    )
    return dataclasses.replace(batch, cache=cache, counts=counts_RV), choice


def _logits(params: Params, x_BTD: jax.Array, shape: Shape) -> Float[Array, "B T V"]:
    return reshard(unembed(params, x_BTD, shape.compute), "batch", None, None)


def _tell(logits_BV: jax.Array, tokens_B: jax.Array, shape: Shape) -> Choice:
    """Returns the tokens with log-probabilities of the model's own distribution.

    A token has the same float in both places where it is told.
    """
    largest_B1 = jax.lax.top_k(logits_BV, 1)[0]
    log_sum_B1 = largest_B1 + jnp.log(
        jnp.sum(jnp.exp(logits_BV - largest_B1), axis=-1, keepdims=True)
    )
    top_BA, ids_BA = jax.lax.top_k(logits_BV[:, : shape.sampled_vocab], num_alternatives(shape))
    return Choice(
        tokens=tokens_B,
        log_probs=sampling.pick(logits_BV, tokens_B) - log_sum_B1[:, 0],
        top_ids=ids_BA,
        top_log_probs=top_BA - log_sum_B1,
    )


def num_alternatives(shape: Shape) -> int:
    """Returns how many alternatives are computed for each token."""
    return min(MAX_ALTERNATIVES, shape.sampled_vocab)


@functools.partial(jax.jit, static_argnames="num_places")
def resize(
    array: Float[Array, "R ..."], source: Int[Array, "B"], *, num_places: int
) -> Float[Array, "B ..."]:
    """Returns rows `source` of an array; if it is of a cache, with this number of places."""
    new = array.at[source].get(out_sharding=_sharding(array))
    if array.ndim != 4:
        return new
    missing = num_places - array.shape[2]
    if missing > 0:
        return jnp.pad(new, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return new[:, :, :num_places]


@functools.partial(jax.jit, donate_argnums=0)
def put(
    array: Float[Array, "R ..."], part: Float[Array, "1 ..."], row: Int[Array, ""]
) -> Float[Array, "R ..."]:
    """Returns the array with one of its rows replaced; places beyond the part's stay."""
    split = _sharding(array)
    part = part if split is None else jax.sharding.reshard(part, split)
    return jax.lax.dynamic_update_slice(array, part, (row, *[0] * (array.ndim - 1)))


def _sharding(array: jax.Array) -> jax.sharding.PartitionSpec | None:
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.typeof(array).sharding.spec


@functools.partial(jax.jit, static_argnames=("num_rows", "num_places", "shape"))
def init_batch(*, num_rows: int, num_places: int, shape: Shape) -> Batch:
    """Returns a batch with nothing in it."""
    size = (num_rows, shape.config.vocab_size)
    return Batch(
        cache=init_cache(shape.config, num_rows, num_places, shape.compute.dtype),
        seen=reshard(jnp.zeros(size, bool), "batch", None),
        counts=reshard(jnp.zeros(size, jnp.int32), "batch", None),
        bias=reshard(jnp.zeros(size, jnp.float32), "batch", None),
    )


@functools.partial(jax.jit, static_argnames=("num_places", "shape"))
def empty_cache(*, num_places: int, shape: Shape) -> Cache:
    """Returns the cache in which a prompt runs."""
    return init_cache(shape.config, 1, num_places, shape.compute.dtype)
