"""Records to tokens: the work that `meshlm data prepare` spreads over processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np

from meshlm.data.readers import Record, document_key, pile_set_name
from meshlm.data.store import SPLITS, Counts, SplitCounts, token_dtype
from meshlm.data.tokenizer import Tokenizer, from_json

_Key = TypeVar("_Key", int, str)


class _Line(msgspec.Struct):
    text: str
    meta: Any = None


_decode_line = msgspec.json.Decoder(_Line).decode


Records = list[tuple[int, Record]]
"""(index of the file, record), in order."""


@dataclass(kw_only=True)
class Encoded:
    """The tokens of a batch.

    Attributes:
        tokens: by split, as they go to disk.
        starts: by split, of the documents that begin here, counted from the batch's first token.
        sources: counts by file.
        sets: counts by the Pile's set.
        bad: (ordinal among the documents that end in this batch, file, where, reason).
        num_ended: documents that end in this batch, bad and empty ones included.
        num_empty: documents without text, which are left out.
    """

    tokens: dict[str, bytes] = field(default_factory=dict)
    starts: dict[str, np.ndarray] = field(default_factory=dict)
    sources: dict[int, SplitCounts] = field(default_factory=dict)
    sets: dict[str, SplitCounts] = field(default_factory=dict)
    bad: list[tuple[int, int, str, str]] = field(default_factory=list)
    num_ended: int = 0
    num_empty: int = 0


def split_of(source: int, document: int, key: bytes, val_fraction: float) -> str:
    """The split of a document, by its key. The very first document of all is always `train`."""
    chosen = int.from_bytes(key, "big") < val_fraction * 2.0**64
    return "val" if chosen and (source, document) != (0, 0) else "train"


def parse(record: Record) -> Record:
    """The record with its line of JSON read: `text`, `key` and `set_name` filled in, or `bad`."""
    if record.line is None or record.bad:
        return record
    try:
        line = _decode_line(record.line)
    except (ValueError, RecursionError) as error:
        return record._replace(line=None, bad=_reason(error))
    key = document_key(line.text)
    return record._replace(line=None, text=line.text, key=key, set_name=pile_set_name(line.meta))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason})"
    if isinstance(error, RecursionError):
        return "JSON nested too deep"
    if isinstance(error, msgspec.ValidationError):
        return f"no text: {error}"
    return f"not JSON: {error}"


class Encoder:
    """Encodes batches with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, val_fraction: float) -> None:
        self._tokenizer = tokenizer
        self._val_fraction = val_fraction
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.end_of_text_id], self._dtype)

    def encode(self, records: Records) -> Encoded:
        """The tokens of `records`, with counts and what was bad."""
        encoded = Encoded()
        arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        starts: dict[str, list[int]] = {split: [] for split in SPLITS}
        sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)
        for source, unparsed in records:
            record = parse(unparsed)
            encoded.num_ended += record.last
            if record.bad:
                encoded.bad.append((encoded.num_ended, source, record.where, record.bad))
                continue
            if not record.text:
                encoded.num_empty += 1
                continue
            split = split_of(source, record.document, record.key, self._val_fraction)
            tokens = self._tokenizer.encode_array(record.text).astype(self._dtype)
            arrays[split] += [tokens, self._end] if record.last else [tokens]
            starts[split] += [sizes[split]] if record.first else []
            sizes[split] += len(tokens) + record.last
            counts = Counts(
                num_documents=int(record.first),
                num_tokens=len(tokens) + record.last,
                num_bytes=len(record.text.encode()),
            )
            add_counts(encoded.sources, source, split, counts)
            if record.set_name is not None:
                add_counts(encoded.sets, record.set_name, split, counts)
        for split in SPLITS:
            encoded.tokens[split] = b"".join(array.tobytes() for array in arrays[split])
            encoded.starts[split] = np.array(starts[split], np.uint64)
        return encoded


def add_counts(total: dict[_Key, SplitCounts], key: _Key, split: str, counts: Counts) -> None:
    """Adds `counts` to those of `key` and `split`."""
    total.setdefault(key, {}).setdefault(split, Counts()).add(counts)


_encoder: Encoder


def _start_worker(tokenizer_json: bytes, val_fraction: float) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(from_json(tokenizer_json), val_fraction)


def _end_with_parent() -> None:
    # A parent killed by -9 cannot stop its workers, and their queue never closes: both ends are
    # theirs.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(records: Records) -> Encoded:
    return _encoder.encode(records)


Submit = Callable[[Records], "Future[Encoded]"]


@contextmanager
def encoders(tokenizer: Tokenizer, val_fraction: float, workers: int) -> Iterator[Submit]:
    """A function that has records encoded by one of `workers` processes; with one, by this
    process."""
    if workers == 1:
        encoder = Encoder(tokenizer, val_fraction)
        yield lambda records: _done(encoder.encode(records))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.to_json(), val_fraction),
    )
    try:
        yield lambda records: pool.submit(_encode_in_worker, records)
    finally:
        pool.shutdown(cancel_futures=True)


def _done(encoded: Encoded) -> "Future[Encoded]":
    future: Future[Encoded] = Future()
    future.set_result(encoded)
    return future
