"""From logits to a token: pure functions, every option an array with one value a row.

The order, which is that of transformers' processors:

1. padded ids    ids from `allowed_vocab` on are never chosen.
2. repetition    logits of tokens in the prompt and in the output so far are divided by the penalty
                 where positive and multiplied by it where negative.
   presence      is subtracted from the logits of tokens in the output so far, `frequency` once for
                 each time that they are there, and then biases are added (the server's; OpenAI's).
3. temperature   logits are divided by it; 0 means greedy: the first most probable token.
4. top_k         tokens whose logit is below the k-th largest go; ties with the k-th stay.
5. top_p         the most probable tokens stay until their mass reaches p, the one that crosses p
                 included; the mass is of what top_k left. Ties with the last one stay.
6. min_p         tokens less probable than min_p times the most probable one go.
7. draw          the largest of logit + Gumbel noise, with a key made of (seed, prompt index, sample
                 index, position) alone.

With `filters_first` steps 4 to 6 come before step 3, as in the original: they look at the
distribution that no temperature has changed, and top_p at the mass of all tokens rather than of
those that top_k left.

Log-probabilities are of the model's own distribution: of the logits before all of this, over all
rows of the head, as in training and in `score.py`.

Dim letters: B batch, V vocabulary rows, A alternatives.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from meshlm.core.tree import pytree

# Below it a temperature is taken for 0; the quotient stays finite in float32.
MIN_TEMPERATURE = 1e-30


@pytree
class RowOptions:
    """The options of each row, and who the row is."""

    seed: UInt32[Array, "B"]
    """The low 32 bits of the seed."""
    seed_high: UInt32[Array, "B"]
    """The high 32 bits: 0 for seeds from 0 to 2**32 - 1."""
    prompt_index: Int[Array, "B"]
    sample_index: Int[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    """The vocabulary or more: no limit."""
    top_p: Float[Array, "B"]
    """1: no limit."""
    min_p: Float[Array, "B"]
    """0: no limit."""
    repetition_penalty: Float[Array, "B"]
    """1: none."""


@pytree
class Adjustments:
    """What else is added to each row's logits."""

    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    counts: Int[Array, "B V"]
    """How often the output so far has each token."""
    bias: Float[Array, "B V"]
    has_bias: Bool[Array, "B"]
    """Whether the row's bias is other than 0."""


def process_logits(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    options: RowOptions,
    allowed_vocab: int,
    filters_first: bool = False,
    adjustments: Adjustments | None = None,
) -> Float[Array, "B V"]:
    """Returns the logits after steps 1 to 6, -inf where a token cannot be chosen.

    They are relative to the largest one of their row.

    Args:
        seen_BV: the tokens of the prompt and of the output so far.
        filters_first: the original's order.

    Source of that order: mesh-transformer-jax, sampling.py:10-44, without its slip that top-k
    never takes token 0 away.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, logits_BV.shape[1]), 1)
    logits_BV = jnp.where(ids < allowed_vocab, logits_BV, -jnp.inf)
    logits_BV = penalise(logits_BV, seen_BV, options.repetition_penalty)
    if adjustments is not None:
        logits_BV = adjust(logits_BV, adjustments)
    if filters_first:
        return _filter_first(logits_BV, options)
    logits_BV = divide_by_temperature(logits_BV, options.temperature)
    return keep_min_p(_keep_top_p(_keep_top_k(logits_BV, options), options), options.min_p)


def _filter_first(logits_BV: jax.Array, options: RowOptions) -> jax.Array:
    parts = (
        _keep_top_k(logits_BV, options),
        _keep_top_p(logits_BV, options),
        keep_min_p(logits_BV, options.min_p),
    )
    kept_BV = functools.reduce(jnp.minimum, parts)
    return divide_by_temperature(kept_BV, options.temperature)


def _keep_top_k(logits_BV: jax.Array, options: RowOptions) -> jax.Array:
    used_B = options.top_k < logits_BV.shape[1]
    return _where_used(keep_top_k, logits_BV, options.top_k, used_B)


def _keep_top_p(logits_BV: jax.Array, options: RowOptions) -> jax.Array:
    return _where_used(keep_top_p, logits_BV, options.top_p, options.top_p < 1)


def _where_used(
    step: Callable[[jax.Array, jax.Array], jax.Array],
    logits_BV: jax.Array,
    value_B: jax.Array,
    used_B: jax.Array,
) -> jax.Array:
    """Returns `step` applied to the rows that use it; no work where none does."""
    return jax.lax.cond(
        jnp.any(used_B),
        lambda: jnp.where(used_B[:, None], step(logits_BV, value_B), logits_BV),
        lambda: logits_BV,
    )


def penalise(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Returns the logits, those of seen tokens made smaller by the penalty.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with the sign cared for.
    """
    penalty_B1 = penalty_B[:, None]
    smaller_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, smaller_BV, logits_BV)


def adjust(logits_BV: Float[Array, "B V"], extra: Adjustments) -> Float[Array, "B V"]:
    """Returns the logits less the penalties for tokens of the output, plus the biases.

    Source: OpenAI's API reference, `frequency_penalty`, `presence_penalty` and `logit_bias`.
    """

    def changed() -> jax.Array:
        penalty_BV = extra.counts * extra.frequency[:, None]
        penalty_BV += jnp.where(extra.counts > 0, extra.presence[:, None], 0.0)
        return logits_BV - penalty_BV + extra.bias

    used_B = (extra.presence != 0) | (extra.frequency != 0) | extra.has_bias
    return jax.lax.cond(jnp.any(used_B), changed, lambda: logits_BV)


def divide_by_temperature(
    logits_BV: Float[Array, "B V"], temperature_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Returns the logits relative to the row's largest, over the temperature where it is not 0."""
    relative_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    divisor_B = jnp.where(temperature_B > MIN_TEMPERATURE, temperature_B, 1.0)
    return relative_BV / divisor_B[:, None]


def keep_top_k(logits_BV: Float[Array, "B V"], k_B: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Returns the logits, -inf below each row's k-th largest."""

    def enough(at_least_BV: jax.Array) -> jax.Array:
        return jnp.sum(at_least_BV, axis=-1) >= k_B

    return _keep_largest(logits_BV, enough)


def keep_top_p(logits_BV: Float[Array, "B V"], p_B: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Returns the logits, -inf below the largest ones whose probabilities reach p together."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)

    def enough(at_least_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(at_least_BV, probs_BV, 0.0), axis=-1) >= p_B

    return _keep_largest(logits_BV, enough)


def keep_min_p(logits_BV: Float[Array, "B V"], p_B: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Returns the logits, -inf where a token is less than p times as probable as the first."""
    least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _keep_largest(
    logits_BV: Float[Array, "B V"], enough: Callable[[jax.Array], jax.Array]
) -> Float[Array, "B V"]:
    """Returns the logits, -inf below each row's largest threshold that lets `enough` through.

    The threshold is found bit by bit, in 32 passes: on a CPU some fifty times faster than a sort.
    """
    # -0.0 and 0.0 are equal and their bits are not.
    one_zero_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)
    bits_BV = jax.lax.bitcast_convert_type(one_zero_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats: negative ones have all bits turned.
    rank_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def settle_bit(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        candidate_B = threshold_B | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(rank_BV >= candidate_B[:, None]), candidate_B, threshold_B)

    start_B = jnp.zeros_like(rank_BV[:, 0])
    threshold_B = jax.lax.fori_loop(0, 32, settle_bit, start_B)
    return jnp.where(rank_BV >= threshold_B[:, None], logits_BV, -jnp.inf)


def draw(
    logits_BV: Float[Array, "B V"], options: RowOptions, positions_B: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Returns a token for each row, with probability softmax(logits); the largest where greedy.

    Args:
        positions_B: the position in its sequence that each new token takes.
    """
    random_B = options.temperature > MIN_TEMPERATURE

    def noisy() -> jax.Array:
        words_B2 = jnp.stack([options.seed_high, options.seed], axis=-1)
        noise_BV = jax.vmap(lambda identity: _noise(identity, logits_BV.shape[1]))(
            (words_B2, options.prompt_index, options.sample_index, positions_B)
        )
        return jnp.where(random_B[:, None], logits_BV + noise_BV, logits_BV)

    scores_BV = jax.lax.cond(jnp.any(random_B), noisy, lambda: logits_BV)
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)


def _noise(identity: tuple[jax.Array, ...], size: int) -> Float[Array, "V"]:
    words, *parts = identity
    # As jax.random.key makes a key of a 64-bit seed; of a 32-bit one the high word is 0.
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    for part in parts:
        key = jax.random.fold_in(key, part)
    return jax.random.gumbel(key, (size,), jnp.float32)


def log_probs(logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Returns natural log-probabilities of the model's own distribution, in float32."""
    return jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)


def pick(values_BV: Float[Array, "B V"], tokens_B: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns each row's value for its token."""
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, values_BV.shape[1]), 1)
    return jnp.sum(jnp.where(ids == tokens_B[:, None], values_BV, 0.0), axis=-1)


def most_probable(
    log_probs_BV: Float[Array, "B V"], allowed_vocab: int, count: int
) -> tuple[Float[Array, "B A"], Int[Array, "B A"]]:
    """Returns the `count` largest log-probabilities among allowed ids, and those ids."""
    return jax.lax.top_k(log_probs_BV[:, :allowed_vocab], count)
