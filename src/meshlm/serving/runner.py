"""The batch on the device, and prompts on their way into it.

Dim letters: R rows of the batch, C tokens of a chunk, B rows, A alternatives.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from meshlm.model.cache import Cache
from meshlm.serving import steps
from meshlm.serving.compiled import Compiled
from meshlm.serving.requests import Request, TokenScore
from meshlm.serving.scheduler import Layout, enough
from meshlm.serving.settings import bias_row, row_settings, seen_row

_PER_ROW = ("seen", "counts", "bias")


class Prefilled(NamedTuple):
    """A prompt, or its beginning, that has been run."""

    cache: Cache
    """One row; places beyond the tokens that were run hold nothing of meaning."""
    hidden: Float[Array, "1 D"] | None
    """What the next token is predicted from; None where nothing has run yet."""

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))


class Chosen(NamedTuple):
    """Tokens and how probable they were, on the host."""

    tokens: np.ndarray
    log_probs: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray

    @classmethod
    def fetch(cls, choice: steps.Choice) -> "Chosen":
        """Returns the choice once it is computed."""
        return cls(
            *jax.device_get((choice.tokens, choice.log_probs, choice.top_ids, choice.top_log_probs))
        )

    def score(self, row: int, alternatives: int) -> TokenScore:
        """Returns a row's token with so many of the most probable ones."""
        ids = self.top_ids[row, :alternatives].tolist()
        top = tuple(zip(ids, self.top_log_probs[row, :alternatives].tolist(), strict=True))
        return TokenScore(int(self.tokens[row]), float(self.log_probs[row]), top)


class Runner:
    """Runs prompts and the batch; for one thread, in the model's mesh."""

    def __init__(self, compiled: Compiled) -> None:
        """Makes a runner with the smallest batch, from functions that are compiled."""
        self._compiled = compiled
        self._params = compiled.model.params
        self._vocab_size = compiled.shape.config.vocab_size
        self.reset()

    def reset(self) -> None:
        """Makes the batch the smallest one, with nobody in it."""
        self._batch: steps.Batch = self._compiled.get("batch")()
        self._requests: list[Request | None] = [None] * self._compiled.row_sizes[0]
        self._settings: steps.RowSettings | None = None

    def begin(self, prompt_length: int, reuse: Prefilled | None) -> Prefilled:
        """Returns what a prompt runs into: empty, or a copy of another prompt's beginning."""
        places = enough(self._compiled.place_sizes, prompt_length)
        if reuse is None:
            return Prefilled(self._compiled.get("cache", places)(), None)
        before = reuse.cache.num_places
        resize = self._compiled.get("resize", "cache", 1, before, 1, places)
        only = np.zeros(1, np.int32)
        return Prefilled(jax.tree.map(lambda x: resize(x, only), reuse.cache), reuse.hidden)

    def prefill(
        self, prefilled: Prefilled, tokens: Sequence[int], start: int, next_tokens: Sequence[int]
    ) -> tuple[Prefilled, Chosen | None]:
        """Returns the prompt with one more chunk run, which uses `prefilled` up.

        Args:
            tokens: the chunk, at most `Compiled.chunk_sizes[-1]` tokens.
            start: the position of the first of them.
            next_tokens: what to score: the tokens after each of the chunk's; none scores nothing.
        """
        size = enough(self._compiled.chunk_sizes, len(tokens))
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        run = self._compiled.get("prefill", size, prefilled.cache.num_places)
        last = np.int32(len(tokens) - 1)
        cache, x_1CD, hidden = run(self._params, prefilled.cache, padded, np.int32(start), last)
        scores = None
        if next_tokens:
            following = np.zeros(size, np.int32)
            following[: len(next_tokens)] = next_tokens
            score = self._compiled.get("score", size)
            scores = Chosen.fetch(score(self._params, x_1CD, following))
        return Prefilled(cache, hidden), scores

    def choose(self, prefilled: Prefilled, request: Request) -> Chosen:
        """Returns the first token after a prompt that has been run."""
        settings = row_settings([request], self._vocab_size)
        seen = seen_row(request, self._vocab_size)
        counts = np.zeros((1, self._vocab_size), np.int32)
        bias = bias_row(request, self._vocab_size)
        position = np.array([len(request.prompt)], np.int32)
        choose = self._compiled.get("choose")
        return Chosen.fetch(
            choose(self._params, prefilled.hidden, seen, counts, bias, settings, position)
        )

    def put(self, row: int, prefilled: Prefilled, request: Request) -> None:
        """Copies a prompt into a row of the batch."""
        batch, rows = self._batch, len(self._requests)
        move = self._compiled.get(
            "put", "cache", rows, batch.cache.num_places, prefilled.cache.num_places
        )
        cache = jax.tree.map(
            lambda old, part: move(old, part, np.int32(row)), batch.cache, prefilled.cache
        )
        new = {
            "seen": seen_row(request, self._vocab_size),
            "counts": np.zeros((1, self._vocab_size), np.int32),
            "bias": bias_row(request, self._vocab_size),
        }
        changed = {
            name: self._compiled.get("put", name, rows)(
                getattr(batch, name), new[name], np.int32(row)
            )
            for name in _PER_ROW
        }
        self._batch = dataclasses.replace(batch, cache=cache, **changed)
        self._requests[row] = request
        self._settings = None

    def remove(self, row: int) -> None:
        """Forgets a row; it computes along as the cheapest one, unseen."""
        self._requests[row] = None
        self._settings = None

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Chosen:
        """Returns each row's next token, after running its last one at its position."""
        rows = len(self._requests)
        if self._settings is None:
            self._settings = row_settings(self._requests, self._vocab_size)
        step = self._compiled.get("decode", rows, self._batch.cache.num_places)
        self._batch, choice = step(
            self._params,
            self._batch,
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            self._settings,
        )
        return Chosen.fetch(choice)

    def reform(self, layout: Layout) -> None:
        """Gives the batch another form."""
        rows = len(self._requests)
        source = np.maximum(np.array(layout.source, np.int32), 0)
        batch, places = self._batch, self._batch.cache.num_places
        cache = batch.cache
        if layout.num_rows != rows:
            resize = self._compiled.get("resize", "cache", rows, places, layout.num_rows, places)
            cache = jax.tree.map(lambda x: resize(x, source), cache)
            changed = {
                name: self._compiled.get("resize", name, rows, 0, layout.num_rows, 0)(
                    getattr(batch, name), source
                )
                for name in _PER_ROW
            }
            batch = dataclasses.replace(batch, **changed)
            before = self._requests
            self._requests = [None if old < 0 else before[old] for old in layout.source]
        if layout.num_places != places:
            resize = self._compiled.get(
                "resize", "cache", layout.num_rows, places, layout.num_rows, layout.num_places
            )
            same = np.arange(layout.num_rows, dtype=np.int32)
            cache = jax.tree.map(lambda x: resize(x, same), cache)
        self._batch = dataclasses.replace(batch, cache=cache)
        self._settings = None
