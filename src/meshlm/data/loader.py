"""Token stores -> batches, by Grain: `batch(seed, step)` is a pure function.

A store is cut into windows of seq_len + 1 tokens that do not overlap, as the original cut its data;
what is left at the end is not used. Grain's index shuffle orders the windows of each store, in
another order each epoch, without reading one; a mixture takes rows from the stores in proportion to
their weights. Row r of step s is element `s * batch_size + r` of that endless sequence, so a step
can be read alone, from any process, and resuming costs nothing.

Dim letters: B batch, T time.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import grain
import numpy as np
from jaxtyping import Float32, Int32

from meshlm.core.errors import BadInputError, UsageError

_WEIGHT_UNIT = 2**32
_PREFETCH_THREADS = 2
_PREFETCH_STEPS = 4
_SEARCH_BLOCK = 4096


class TokenBytes(Protocol):
    """What is asked of a tokenizer here."""

    name: str
    vocab_size: int
    end_of_text_id: int
    fingerprint: str

    def token_bytes(self, token: int) -> bytes: ...


class Numbers(Protocol):
    """A sorted sequence of numbers, in memory or in a file; slices are arrays."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Tokens(Protocol):
    """What is asked of a token store here; `meshlm.data.store.TokenStore` has it."""

    @property
    def path(self) -> Path: ...
    @property
    def tokenizer(self) -> TokenBytes: ...
    def num_tokens(self, split: str) -> int: ...
    def read(self, split: str, start: int, stop: int) -> np.ndarray: ...
    def document_starts(self, split: str) -> Numbers: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of a global batch."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    """the token after each one of `tokens`"""
    loss_mask: Float32[np.ndarray, "B T"]
    """1 where the target counts, 0 where it does not"""
    segment_ids: Int32[np.ndarray, "B T"] | None = None
    """with document_mask: which of its row's documents a token is of, from 0"""


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Where a row was read."""

    store: Path
    start: int
    """the window's first token, counted from the start of the store's train split"""
    documents: range
    """the indices of the documents that the window touches"""


@dataclass(frozen=True, kw_only=True)
class EvalBatch:
    """A batch of an evaluation and what it covers."""

    batch: Batch
    num_targets: int
    """targets with loss_mask 1"""
    bytes_of_rows: np.ndarray
    """UTF-8 bytes of text that each row's targets stand for; end-of-text stands for none"""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of text that all targets stand for"""
        return int(self.bytes_of_rows.sum())


def parse_mixture(arguments: Sequence[str]) -> list[tuple[Path, float]]:
    """Stores and their weights, which add up to 1, from `PATH=WEIGHT` or `PATH` (weight 1).

    A path may hold `=`: an argument that is the path of something, while what stands before its
    last `=` is none, has no weight.

    Raises: UsageError that quotes the argument.
    """
    if not arguments:
        raise UsageError("--data: no store given; write --data STORE or --data A=0.7 B=0.3")
    weights: dict[Path, float] = {}
    for argument in arguments:
        path, equals, number = argument.rpartition("=")
        if not equals or (os.path.lexists(argument) and not os.path.lexists(path)):
            path, number = argument, "1"
        if not path:
            raise UsageError(f"--data {argument}: the path is missing; write PATH=WEIGHT")
        try:
            weight = float(number)
        except ValueError:
            raise UsageError(
                f"--data {argument}: {number!r} is not a weight; write PATH=WEIGHT, as A=0.7"
            ) from None
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"--data {argument}: a weight must be above 0 and finite")
        if Path(path) in weights:
            raise UsageError(f"--data {argument}: {path} is given twice; add the weights up")
        weights[Path(path)] = weight
    total = math.fsum(weights.values())
    return [(path, weight / total) for path, weight in weights.items()]


class BatchSource:
    """The training batches of a mixture of stores, endless, each a function of seed and step."""

    def __init__(
        self,
        stores_and_weights: Sequence[tuple[Tokens, float]],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        document_mask: bool = False,
    ) -> None:
        """Raises: UsageError, BadInputError when a store has no whole window or two stores have
        different vocabularies. No token is read."""
        _check_sizes(seq_len, batch_size)
        if seed < 0:
            raise UsageError(f"--seed {seed}: give 0 or more")
        self._stores = [store for store, _ in stores_and_weights]
        _check_one_vocabulary(self._stores)
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._document_mask = document_mask
        self.num_windows = [_num_windows(store, seq_len) for store in self._stores]
        """Sequences in one epoch of each store."""
        orders = [
            grain.MapDataset.range(count).shuffle(seed=_store_seed(seed, i)).repeat()
            for i, count in enumerate(self.num_windows)
        ]
        choice = _Proportions([weight for _, weight in stores_and_weights])
        numbered = [order.map(lambda window, i=i: (i, window)) for i, order in enumerate(orders)]
        self._windows = grain.MapDataset.select_from_datasets(numbered, choice)
        # Grain sets up what it keeps at the first look, and not safely from two threads.
        assert self._windows[0] is not None

    def rows(self, step: int, rows: Sequence[int]) -> Batch:
        """Those rows of the global batch of a step; no other row is read."""
        width = self._seq_len + 1
        read = [
            _read_window(self._stores[i], "train", window * width, width, self._document_mask)
            for i, window in self._row_windows(step, rows)
        ]
        return _stack(read)

    def iterate(self, start_step: int, rows: Sequence[int]) -> Iterator[Batch]:
        """`rows(step, rows)` for each step from start_step on, read ahead by threads.

        Closing the iterator ends the threads.
        """
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        options = grain.ReadOptions(
            num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCH_STEPS
        )
        batches = steps.map(lambda step: self.rows(step, rows)).to_iter_dataset(options)
        with contextlib.closing(iter(batches)) as iterator:
            yield from iterator

    def provenance(self, step: int) -> list[RowSource]:
        """Where each row of a step comes from. It reads no token."""
        width = self._seq_len + 1
        sources = []
        for i, window in self._row_windows(step, range(self._batch_size)):
            starts = self._stores[i].document_starts("train")
            first, inside = _starts_between(starts, window * width + 1, (window + 1) * width)
            documents = range(first - 1, first + len(inside))
            sources.append(
                RowSource(store=self._stores[i].path, start=window * width, documents=documents)
            )
        return sources

    def _row_windows(self, step: int, rows: Sequence[int]) -> list[tuple[int, int]]:
        """The store and window of each row."""
        assert step >= 0
        assert len(rows) > 0
        assert 0 <= min(rows) <= max(rows) < self._batch_size
        first = step * self._batch_size
        picked = [self._windows[first + row] for row in rows]
        return cast(
            list[tuple[int, int]], picked
        )  # Grain's None is for filters, and there are none


def eval_batches(
    store: Tokens,
    split: str,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None = None,
    document_mask: bool = False,
    rows: Sequence[int] | None = None,
) -> Iterator[EvalBatch]:
    """A split once from start to end: every token but the first is a target of exactly one row.

    Windows are of seq_len + 1 tokens and share one token with the next. The last one, and the last
    batch, are filled up with loss_mask 0. With `max_tokens` only so many targets are taken (one
    window at least), in windows spread evenly over the split. No targets, no batches. With `rows`
    only those of each batch are read, given and counted.
    """
    _check_sizes(seq_len, batch_size)
    num_targets = max(0, store.num_tokens(split) - 1)
    num_windows, width = -(-num_targets // seq_len), seq_len + 1
    taken = num_windows
    if max_tokens is not None:
        taken = min(num_windows, max(1, max_tokens // seq_len))
    windows = [i * num_windows // taken for i in range(taken)]
    lengths = _byte_lengths(store.tokenizer)
    for first in range(0, taken, batch_size):
        batch = _stack(
            [
                _read_window(store, split, windows[first + row] * seq_len, width, document_mask)
                if first + row < taken
                else _empty_row(seq_len, document_mask)
                for row in (range(batch_size) if rows is None else rows)
            ]
        )
        counted = batch.loss_mask > 0
        yield EvalBatch(
            batch=batch,
            num_targets=int(counted.sum()),
            bytes_of_rows=np.sum(lengths[batch.targets] * counted, axis=1, dtype=np.int32),
        )


def _empty_row(seq_len: int, document_mask: bool) -> Batch:
    return Batch(
        tokens=np.zeros((1, seq_len), np.int32),
        targets=np.zeros((1, seq_len), np.int32),
        loss_mask=np.zeros((1, seq_len), np.float32),
        segment_ids=np.zeros((1, seq_len), np.int32) if document_mask else None,
    )


class _Proportions(grain.transforms.DatasetSelectionMap):
    """Which store an element comes from: every prefix holds each store's share, to within a row.

    Grain's own `mix` rounds the weights to a hundredth of the smallest.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        self._units = [max(1, round(weight / total * _WEIGHT_UNIT)) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        # Store by store: of the elements that earlier stores left, this one takes its share.
        left = sum(self._units)
        for store, units in enumerate(self._units):
            before, after = index * units // left, (index + 1) * units // left
            if after > before:
                return store, before
            index -= before
            left -= units
        raise AssertionError("the last store takes whatever is left")


def _check_sizes(seq_len: int, batch_size: int) -> None:
    for option, value in (("--seq-len", seq_len), ("--batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"{option} {value}: give 1 or more")


def _check_one_vocabulary(stores: Sequence[Tokens]) -> None:
    first = stores[0]
    for other in stores[1:]:
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise BadInputError(
                f"{other.path} has the vocabulary {_describe(other.tokenizer)}, but {first.path} "
                f"has {_describe(first.tokenizer)}; prepare both with the same --tokenizer"
            )


def _describe(tokenizer: TokenBytes) -> str:
    return f"{tokenizer.name} ({tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:8]})"


def _num_windows(store: Tokens, seq_len: int) -> int:
    count = store.num_tokens("train")
    if count <= seq_len:
        shorter = f"lower --seq-len to {count - 1} or less, or " if count > 1 else ""
        raise BadInputError(
            f"{store.path}: the train split has {count} tokens, and one sequence needs "
            f"{seq_len + 1} (--seq-len {seq_len} and a last target); {shorter}prepare more text"
        )
    return count // (seq_len + 1)


def _store_seed(seed: int, store: int) -> int:
    # Grain adds the epoch to the seed, so stores must not have neighbouring ones.
    return int(np.random.SeedSequence((seed, store)).generate_state(1)[0])


def _read_window(store: Tokens, split: str, start: int, width: int, document_mask: bool) -> Batch:
    """One row from `width` tokens; filled up with loss_mask 0 where the split ends before."""
    stop = min(start + width, store.num_tokens(split))
    window = np.zeros(width, np.int32)
    window[: stop - start] = store.read(split, start, stop)
    loss_mask = (np.arange(1, width) < stop - start).astype(np.float32)
    segment_ids = None
    if document_mask:
        segments = _segments(store.document_starts(split), start, width)
        # A document does not predict how the next one begins.
        loss_mask[segments[1:] != segments[:-1]] = 0
        segment_ids = segments[None, :-1]
    return Batch(
        tokens=window[None, :-1],
        targets=window[None, 1:],
        loss_mask=loss_mask[None],
        segment_ids=segment_ids,
    )


def _segments(starts: Numbers, start: int, width: int) -> np.ndarray:
    _, inside = _starts_between(starts, start + 1, start + width)
    begins = np.zeros(width, np.int32)
    begins[inside.astype(np.int64) - start] = 1
    return np.cumsum(begins, dtype=np.int32)


def _starts_between(starts: Numbers, first: int, stop: int) -> tuple[int, np.ndarray]:
    """Returns how many starts are below `first`, and those from there on below `stop`.

    The file of a large store has gigabytes: only what a search looks at is read.
    """
    low, high = 0, len(starts)
    while high - low > _SEARCH_BLOCK:
        middle = (low + high) // 2
        if int(starts[middle]) < first:
            low = middle + 1
        else:
            high = middle
    low += _count_below(starts[low:high], first)
    # No document is shorter than its end-of-text: so many at most begin between the two.
    block = starts[low : low + stop - first]
    return low, block[: _count_below(block, stop)]


def _count_below(numbers: np.ndarray, value: int) -> int:
    # A key of another type than the numbers' would have numpy convert them all.
    return int(np.searchsorted(numbers, np.array(value, numbers.dtype)))


def _stack(rows: Sequence[Batch]) -> Batch:
    segment_ids = [row.segment_ids for row in rows if row.segment_ids is not None]
    return Batch(
        tokens=np.concatenate([row.tokens for row in rows]),
        targets=np.concatenate([row.targets for row in rows]),
        loss_mask=np.concatenate([row.loss_mask for row in rows]),
        segment_ids=np.concatenate(segment_ids) if segment_ids else None,
    )


def _byte_lengths(tokenizer: TokenBytes) -> np.ndarray:
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text_id] = 0
    return lengths
