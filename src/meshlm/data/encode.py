"""Records to tokens: the work that `meshlm data prepare` spreads over processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from meshlm.data.parsing import Parser
from meshlm.data.readers import END_OF_TEXT, Reading
from meshlm.data.records import Record
from meshlm.data.store import SPLITS, Counts, SplitCounts, token_dtype
from meshlm.data.tokenizer import Tokenizer, from_json
from meshlm.data.tokenizer_json import SpecialTokenMode

_Key = TypeVar("_Key", int, str)


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
        left_out: (file, where, reason) of files and members that are not read.
        num_marked: documents in which end-of-text is written out.
        num_boms: documents with a byte-order mark within.
        num_split: documents that begin after a separator.
        num_spelled: special tokens but end-of-text that texts spell and that were encoded as text.
    """

    tokens: dict[str, bytes] = field(default_factory=dict)
    starts: dict[str, np.ndarray] = field(default_factory=dict)
    sources: dict[int, SplitCounts] = field(default_factory=dict)
    sets: dict[str, SplitCounts] = field(default_factory=dict)
    bad: list[tuple[int, int, str, str]] = field(default_factory=list)
    left_out: list[tuple[int, str, str]] = field(default_factory=list)
    num_ended: int = 0
    num_empty: int = 0
    num_marked: int = 0
    num_boms: int = 0
    num_spelled: int = 0
    num_split: int = 0


def split_of(source: int, document: Record, val_fraction: float) -> str:
    """The split of a document, by its key. The very first document of all is always `train`."""
    chosen = int.from_bytes(document.key, "big") < val_fraction * 2.0**64
    is_very_first = (source, document.document, document.part) == (0, 0, 0)
    return "val" if chosen and not is_very_first else "train"


class Encoder:
    """Encodes batches with one parser and one tokenizer."""

    def __init__(self, parser: Parser, tokenizer: Tokenizer, val_fraction: float) -> None:
        self._parser = parser
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
        documents = (
            (source, document)
            for source, record in records
            for document in self._parser.documents(record)
        )
        for source, record in documents:
            if record.left_out:
                encoded.left_out.append((source, record.where, record.left_out))
                continue
            encoded.num_ended += record.last
            encoded.num_split += record.last and record.part > 0
            if record.bad:
                encoded.bad.append((encoded.num_ended, source, record.where, record.bad))
                continue
            if not record.text:
                encoded.num_empty += 1
                continue
            if self._tokenizer.special_tokens == "text":
                encoded.num_marked += END_OF_TEXT in record.text
                encoded.num_spelled += self._tokenizer.count_added(record.text, but=END_OF_TEXT)
            encoded.num_boms += "\ufeff" in record.text
            split = split_of(source, record, self._val_fraction)
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


def _start_worker(
    parser_arguments: tuple[str, str | None],
    tokenizer_arguments: tuple[bytes, str, SpecialTokenMode],
    val_fraction: float,
) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer_json, end_of_text, mode = tokenizer_arguments
    tokenizer = from_json(tokenizer_json, end_of_text).with_special_tokens(mode)
    _encoder = Encoder(Parser(*parser_arguments), tokenizer, val_fraction)


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
def encoders(
    reading: Reading, tokenizer: Tokenizer, val_fraction: float, workers: int
) -> Iterator[Submit]:
    """A function that has records encoded by one of `workers` processes; with one, by this
    process."""
    if workers == 1:
        encoder = Encoder(Parser(reading.text_field, reading.split_on), tokenizer, val_fraction)
        yield lambda records: _done(encoder.encode(records))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(
            (reading.text_field, reading.split_on),
            (tokenizer.to_json(), tokenizer.end_of_text, tokenizer.special_tokens),
            val_fraction,
        ),
    )
    try:
        yield lambda records: pool.submit(_encode_in_worker, records)
    finally:
        pool.shutdown(cancel_futures=True)


def _done(encoded: Encoded) -> "Future[Encoded]":
    future: Future[Encoded] = Future()
    future.set_result(encoded)
    return future
