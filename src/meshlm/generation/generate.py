"""Text from prompts: groups of rows, dispatches, stop texts and streaming. The host's side."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.processes import on_host
from meshlm.generation import decode
from meshlm.generation.buckets import (
    MAX_ROWS,
    cache_bucket,
    prefill_parts,
    row_bucket,
)
from meshlm.generation.config import FinishReason, Generation, SamplingConfig, split_seed
from meshlm.generation.sampling import RowOptions
from meshlm.generation.text import TextStream

# While text is streamed a dispatch takes about this long: short of what a reader notices.
STREAM_INTERVAL_S = 0.1

OnText = Callable[[int, int, str], None]


class Generator:
    """Generates text with one model."""

    def __init__(
        self,
        model: decode.DecodeModel,
        *,
        end_ids: Sequence[int],
        start_id: int | None,
        token_bytes: Callable[[int], bytes],
        max_rows: int | None = None,
    ) -> None:
        """Makes a generator; computes nothing.

        Args:
            end_ids: tokens of which any ends a sample; where there are none, nothing but a stop
                text or the length does.
            start_id: the token before the first one of a text; None where there is none.
            token_bytes: gives the bytes of a token's text.
            max_rows: that are decoded together; None for as many as suit any device.
        """
        self._model = model
        # Files may declare any number; an id that is never generated ends nothing.
        self._end_ids = tuple(id for id in end_ids if 0 <= id < model.shape.allowed_vocab)
        self._start_id = start_id
        self._token_bytes = token_bytes
        self._max_rows = max_rows

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_text: OnText | None = None,
    ) -> list[list[Generation]]:
        """Returns `sampling.n` samples for each prompt.

        A token depends on (seed, index of the prompt, index of the sample, position), not on the
        other prompts. An empty prompt stands for the start of a text: the one token `start_id`.

        Args:
            prompts: token ids.
            on_text: called with (prompt index, sample index, new text) as text becomes certain; the
                pieces of a sample joined are its text.

        Raises:
            UsageError: a prompt leaves no room in the context, or has an id that is no token.
            BadInputError: the model's output is NaN or infinite; what came before it was told.
        """
        starts = [list(prompt) or start_of_text(self._start_id) for prompt in prompts]
        for index, start in enumerate(starts):
            self._check_prompt(index, start)
        context = self._model.shape.config.context_length
        rows = [
            _Row(index, sample, start, sampling, context)
            for index, start in enumerate(starts)
            for sample in range(sampling.n)
        ]
        most = self._max_rows or MAX_ROWS
        with self._model.entered():
            for first in range(0, len(rows), most):
                self._run_group(rows[first : first + most], sampling, on_text)
        done = iter(rows)
        return [[row.result() for row in itertools.islice(done, sampling.n)] for _ in starts]

    def _check_prompt(self, index: int, tokens: list[int]) -> None:
        shape = self._model.shape
        if len(tokens) >= shape.config.context_length:
            raise UsageError(
                f"prompt {index} has {len(tokens)} tokens and the context holds "
                f"{shape.config.context_length}, which leaves no room to generate: shorten it to "
                f"at most {shape.config.context_length - 1} tokens"
            )
        check_tokens(f"prompt {index}", tokens, shape.allowed_vocab)

    def _run_group(
        self, rows: list["_Row"], sampling: SamplingConfig, on_text: OnText | None
    ) -> None:
        """Generates until all rows are done; they are decoded together."""
        model = self._model
        num_rows = row_bucket(len(rows), model.batch_shards)
        state = self._prefill(rows, num_rows)
        options = _row_options(rows, num_rows, sampling, model.shape.config.vocab_size)
        end_ids = () if sampling.ignore_end_of_text else self._end_ids
        num_steps = 1 if on_text else decode.MAX_STEPS
        while any(row.remaining for row in rows):
            began = time.perf_counter()
            state, steps = decode.decode(
                model.params,
                state,
                _progress(rows, num_rows, end_ids, len(self._end_ids)),
                options,
                np.int32(num_steps),
                alternatives=bool(sampling.logprobs),
                shape=model.shape,
            )
            chosen = _Chosen.fetch(steps)
            if on_text:
                step_s = (time.perf_counter() - began) / chosen.count
                num_steps = max(1, min(decode.MAX_STEPS, int(STREAM_INTERVAL_S / step_s)))
            for column, row in enumerate(rows):
                piece = self._take(row, chosen.column(column, sampling.logprobs or 0), end_ids)
                if piece and on_text:
                    on_text(row.prompt_index, row.sample_index, piece)

    def _prefill(self, rows: list["_Row"], num_rows: int) -> decode.DecodeState:
        """Returns the state after all prompts; a prompt of several samples is run once."""
        model = self._model
        config, shards = model.shape.config, model.batch_shards
        prompts = {row.prompt_index: row.prompt for row in rows}
        order, starts = list(prompts), list(prompts.values())
        num_places = cache_bucket(
            max(len(row.prompt) + row.remaining for row in rows), config.context_length
        )
        state = decode.init_state(
            _seen(rows, num_rows, config.vocab_size), num_places=num_places, shape=model.shape
        )
        for length, part in prefill_parts(map(len, starts), config.context_length, shards):
            part_rows = row_bucket(len(part), shards)
            lengths = np.ones(part_rows, np.int32)
            lengths[: len(part)] = [len(starts[i]) for i in part]
            tokens = decode.pad_rows([starts[i] for i in part], part_rows, length)
            hidden, cache = decode.prefill(model.params, tokens, lengths, shape=model.shape)
            place_of = {order[i]: place for place, i in enumerate(part)}
            source = np.full(num_rows, -1, np.int32)
            source[: len(rows)] = [place_of.get(row.prompt_index, -1) for row in rows]
            state = decode.place(state, hidden, cache, source)
        return state

    def _take(
        self,
        row: "_Row",
        chosen: Iterator[tuple[int, float, dict[int, float]]],
        end_ids: Sequence[int],
    ) -> str:
        """Returns the new text of a row, after giving it the tokens that were chosen for it."""
        text = ""
        for token, log_prob, alternatives in chosen:
            if not row.remaining:
                break
            if not all(map(math.isfinite, (log_prob, *alternatives.values()))):
                raise not_finite(f"position {row.position} of prompt {row.prompt_index}")
            ended = token in end_ids
            row.add(token, log_prob, alternatives)
            if not ended:
                text += row.stream.push(self._token_bytes(token))
            if ended or row.stream.stopped:
                row.remaining, row.finish_reason = 0, "stop"
            if not row.remaining:
                text += row.stream.finish()
                if row.stream.stopped:
                    row.finish_reason = "stop"
        row.text += text
        return text


class _Row:
    """One sample while it grows."""

    def __init__(
        self,
        prompt_index: int,
        sample_index: int,
        prompt: list[int],
        sampling: SamplingConfig,
        context_length: int,
    ) -> None:
        self.prompt_index = prompt_index
        self.sample_index = sample_index
        self.prompt = prompt
        self.remaining = min(sampling.max_tokens, context_length - len(prompt))
        self.stream = TextStream(sampling.stop)
        self.text = ""
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.alternatives: list[dict[int, float]] | None = [] if sampling.logprobs else None
        self.finish_reason: FinishReason = "length"

    @property
    def position(self) -> int:
        """The position of the next token."""
        return len(self.prompt) + len(self.tokens)

    def add(self, token: int, log_prob: float, alternatives: dict[int, float]) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if self.alternatives is not None:
            self.alternatives.append(alternatives)
        self.remaining -= 1

    def result(self) -> Generation:
        return Generation(
            text=self.text,
            tokens=self.tokens,
            logprobs=self.log_probs,
            top_logprobs=self.alternatives,
            finish_reason=self.finish_reason,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The tokens of a dispatch, on the host."""

    count: int
    tokens: np.ndarray
    log_probs: np.ndarray
    top_ids: np.ndarray | None
    top_log_probs: np.ndarray | None

    @classmethod
    def fetch(cls, steps: decode.Steps) -> "_Chosen":
        top = (steps.top_ids, steps.top_log_probs)
        ids, log_probs = (None if x is None else on_host(x) for x in top)
        return cls(
            count=int(steps.count),
            tokens=on_host(steps.tokens),
            log_probs=on_host(steps.log_probs),
            top_ids=ids,
            top_log_probs=log_probs,
        )

    def column(
        self, row: int, num_alternatives: int
    ) -> Iterator[tuple[int, float, dict[int, float]]]:
        """Yields (token, log-probability, alternatives) of one row, step by step."""
        for step in range(self.count):
            best: dict[int, float] = {}
            if self.top_ids is not None and self.top_log_probs is not None:
                ids = self.top_ids[step, row, :num_alternatives].tolist()
                best = dict(zip(ids, self.top_log_probs[step, row].tolist(), strict=False))
            yield int(self.tokens[step, row]), float(self.log_probs[step, row]), best


def start_of_text(start_id: int | None) -> list[int]:
    """Returns the token before the first one of a text: bos, else end-of-text, as in training.

    Raises:
        UsageError: there is none.
    """
    if start_id is None:
        raise UsageError("an empty prompt stands for end-of-text, and this model has no tokenizer")
    return [start_id]


def check_tokens(what: str, tokens: Sequence[int], allowed_vocab: int) -> None:
    """Raises UsageError where an id is not a token of the vocabulary."""
    wrong = next((token for token in tokens if not 0 <= token < allowed_vocab), None)
    if wrong is not None:
        raise UsageError(f"{what} has token id {wrong}: give ids from 0 to {allowed_vocab - 1}")


def not_finite(where: str) -> BadInputError:
    """Returns the error of a model whose output is NaN or infinite; `where` names the place."""
    return BadInputError(
        f"the model's output at {where} is NaN or infinite, though its weights are finite: they "
        "are too large to compute with; get them again, or use another checkpoint"
    )


def _seen(rows: list[_Row], num_rows: int, vocab_size: int) -> np.ndarray:
    seen = np.zeros((num_rows, vocab_size), bool)
    for i, row in enumerate(rows):
        seen[i, row.prompt] = True
    return seen


def _progress(
    rows: list[_Row], num_rows: int, end_ids: Sequence[int], width: int
) -> decode.RowProgress:
    """Returns the progress; `width` is that of `end_tokens`, which decides what is compiled."""
    ends: Any = np.full((num_rows, max(1, width)), -1, np.int32)
    ends[:, : len(end_ids)] = end_ids

    def column(values: list[int], fill: int) -> Any:
        return np.array(values + [fill] * (num_rows - len(values)), np.int32)

    return decode.RowProgress(
        positions=column([row.position for row in rows], 0),
        remaining=column([row.remaining for row in rows], 0),
        end_tokens=ends,
    )


def _row_options(
    rows: list[_Row], num_rows: int, sampling: SamplingConfig, vocab_size: int
) -> RowOptions:
    def same(value: float, dtype: type) -> Any:
        return np.full(num_rows, value, dtype)

    def column(values: list[int]) -> Any:
        return np.array(values + [0] * (num_rows - len(values)), np.int32)

    top_k = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
    low, high = split_seed(sampling.seed)
    return RowOptions(
        seed=same(low, np.uint32),
        seed_high=same(high, np.uint32),
        prompt_index=column([row.prompt_index for row in rows]),
        sample_index=column([row.sample_index for row in rows]),
        temperature=same(sampling.temperature, np.float32),
        top_k=same(top_k, np.int32),
        top_p=same(1.0 if sampling.top_p is None else sampling.top_p, np.float32),
        min_p=same(sampling.min_p or 0.0, np.float32),
        repetition_penalty=same(sampling.repetition_penalty, np.float32),
    )
