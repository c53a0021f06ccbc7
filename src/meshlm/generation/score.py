"""How probable given text is: log-probabilities of tokens, and of continuations.

Log-probabilities are natural, in float32, over all rows of the head, as in training.

Dim letters: B rows, T time, D model, V vocabulary rows, C positions at a time.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from meshlm.core.errors import UsageError
from meshlm.core.sharding import reshard
from meshlm.generation import decode, sampling
from meshlm.generation.buckets import prefill_parts, row_bucket
from meshlm.generation.generate import check_tokens, not_finite, start_of_text
from meshlm.model.params import Params
from meshlm.model.transformer import unembed

# Logits of so many positions exist at once.
POSITIONS_AT_ONCE = 128


class TokenScores(NamedTuple):
    """For each token but the first: its log-probability given those before it."""

    log_probs: np.ndarray
    """Float32, natural."""
    is_greedy: np.ndarray
    """Whether greedy generation would have chosen this token."""


class Likelihood(NamedTuple):
    """Of a continuation, given its context."""

    log_prob: float
    """Sum over the continuation's tokens, natural."""
    is_greedy: bool
    """Whether greedy generation would have given exactly this continuation."""


class Scorer:
    """Scores token sequences with one model."""

    def __init__(self, model: decode.DecodeModel, *, start_id: int | None) -> None:
        """Makes a scorer, which computes nothing yet; `start_id` begins texts of no context."""
        self._model = model
        self._start_id = start_id

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Returns the scores of each sequence's tokens from the second on.

        Raises:
            UsageError: a sequence is longer than the context, or has an id that is no token.
            BadInputError: the model's output is NaN or infinite.
        """
        shape, shards = self._model.shape, self._model.batch_shards
        for index, tokens in enumerate(sequences):
            self._check(index, tokens, shape.allowed_vocab)
        nothing = TokenScores(np.zeros(0, np.float32), np.zeros(0, bool))
        scores = [nothing] * len(sequences)
        lengths = [len(tokens) for tokens in sequences]
        with self._model.entered():
            for length, part in prefill_parts(lengths, shape.config.context_length, shards):
                rows = [list(sequences[i]) for i in part]
                tokens = decode.pad_rows(rows, row_bucket(len(part), shards), length)
                log_probs, is_greedy = map(
                    np.asarray, _score(self._model.params, tokens, shape=shape)
                )
                for row, i in enumerate(part):
                    count = max(0, lengths[i] - 1)
                    scores[i] = TokenScores(log_probs[row, :count], is_greedy[row, :count])
                    bad = np.flatnonzero(~np.isfinite(scores[i].log_probs))
                    if bad.size:
                        raise not_finite(f"position {bad[0] + 1} of sequence {i}")
        return scores

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Likelihood]:
        """Returns the likelihood of each (context, continuation).

        An empty context stands for the start of a text: the one token `start_id`.

        Raises:
            UsageError: a pair is longer than the context together, or has an id that is no token.
            BadInputError: the model's output is NaN or infinite.
        """
        contexts = [list(context) or start_of_text(self._start_id) for context, _ in pairs]
        whole = [context + list(pair[1]) for context, pair in zip(contexts, pairs, strict=True)]
        likelihoods = []
        for context, scores in zip(contexts, self.token_logprobs(whole), strict=True):
            tail = slice(len(context) - 1, None)
            total = float(np.sum(scores.log_probs[tail], dtype=np.float64))
            likelihoods.append(Likelihood(total, bool(np.all(scores.is_greedy[tail]))))
        return likelihoods

    def logits(self, tokens_BT: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Returns the float32 logits of whole sequences, each token's prediction of the next.

        Ids of padded rows may be looked at too.

        Raises:
            UsageError: the sequences are longer than the context, or have an id without a row.
        """
        num_rows, length = tokens_BT.shape
        rows_of_head = self._model.shape.config.vocab_size
        for index, tokens in enumerate(tokens_BT.tolist()):
            self._check(index, tokens, rows_of_head)
        shape, shards = self._model.shape, self._model.batch_shards
        logits = np.zeros((num_rows, length, shape.config.vocab_size), np.float32)
        with self._model.entered():
            lengths = [length] * num_rows
            for bucket, part in prefill_parts(lengths, shape.config.context_length, shards):
                rows = [tokens_BT[i].tolist() for i in part]
                tokens = decode.pad_rows(rows, row_bucket(len(part), shards), bucket)
                found = np.asarray(_logits(self._model.params, tokens, shape=shape))
                logits[part] = found[: len(part), :length]
        return logits

    def _check(self, index: int, tokens: Sequence[int], num_ids: int) -> None:
        shape = self._model.shape
        if len(tokens) > shape.config.context_length:
            raise UsageError(
                f"sequence {index} has {len(tokens)} tokens and the context holds "
                f"{shape.config.context_length}: cut it to that length"
            )
        check_tokens(f"sequence {index}", tokens, num_ids)


@functools.partial(jax.jit, static_argnames="shape")
def _logits(
    params: Params, tokens_BT: Int[Array, "B T"], *, shape: decode.Shape
) -> Float[Array, "B T V"]:
    x_BTD, _ = decode.run_whole(params, reshard(tokens_BT, "batch", None), shape)
    return reshard(unembed(params, x_BTD, shape.compute), None, None, None)


@functools.partial(jax.jit, static_argnames="shape")
def _score(
    params: Params, tokens_BT: Int[Array, "B T"], *, shape: decode.Shape
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns how probable the next token is at each position, and whether greedy."""
    num_rows, length = tokens_BT.shape
    x_BTD, _ = decode.run_whole(params, reshard(tokens_BT, "batch", None), shape)
    next_BT = reshard(jnp.roll(tokens_BT, -1, axis=1), "batch", None)
    size = math.gcd(length, POSITIONS_AT_ONCE)

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, tokens_BC = part
        logits_BCV = reshard(unembed(params, x_BCD, shape.compute), "batch", None, None)
        log_probs_BCV = sampling.log_probs(logits_BCV)
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BCV.shape[-1]), 2)
        chosen_BC = jnp.sum(jnp.where(ids == tokens_BC[..., None], log_probs_BCV, 0.0), axis=-1)
        allowed_BCV = jnp.where(ids < shape.sampled_vocab, logits_BCV, -jnp.inf)
        return chosen_BC, jnp.argmax(allowed_BCV, axis=-1) == tokens_BC

    def cut(x_BT: jax.Array) -> jax.Array:
        return x_BT.reshape(num_rows, length // size, size, *x_BT.shape[2:]).swapaxes(0, 1)

    def join(x_CBT: jax.Array) -> jax.Array:
        return reshard(x_CBT.swapaxes(0, 1).reshape(num_rows, length), None, None)

    log_probs, is_greedy = jax.lax.map(score, (cut(x_BTD), cut(next_BT)))
    return join(log_probs), join(is_greedy)
