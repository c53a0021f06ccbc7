"""A store in the making: what is on disk so far, and how to go on from there.

The folder `unfinished` inside the store's folder holds the growing files and `journal.jsonl`. Its
first line says what is being made from what; each further one adds the totals of the batches whose
tokens are safely on disk by then. To go on is to add the lines up, cut the files to the sizes that
follow, and read on at the position of the last line.
"""

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import numpy as np

from meshlm.core import files
from meshlm.core.errors import BadInputError, BusyError
from meshlm.data.encode import Encoded, add_counts
from meshlm.data.inputs import LeftOut
from meshlm.data.kinds import named_compression, named_kind
from meshlm.data.names import from_json_name
from meshlm.data.readers import Prefix
from meshlm.data.store import (
    DOCUMENT_DTYPE,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNFINISHED,
    Counts,
    SplitCounts,
    documents_file,
    tokens_file,
)

JOURNAL = "journal.jsonl"
_Kind = TypeVar("_Kind")
MAX_BAD_EXAMPLES = 20
MAX_SETS = 1000
OTHER_SETS = "(other)"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where reading goes on: after `num_records` of file `source`, which began with `prefix`."""

    source: int = 0
    num_records: int = 0
    prefix: Prefix = field(default_factory=lambda: Prefix(num_bytes=0, sha256=""))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A file that has been read to its end."""

    num_bytes: int
    sha256: str
    modified_ns: int
    truncated: bool
    kind: str = ""
    note: str = ""


@dataclass(kw_only=True)
class Totals:
    """What has been made, or what a line of the journal adds to it."""

    position: Position = field(default_factory=Position)
    sources: dict[int, SplitCounts] = field(default_factory=dict)
    sets: dict[str, SplitCounts] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    num_seen: int = 0
    """Documents, bad and empty ones included."""
    num_bad: int = 0
    num_empty: int = 0
    num_marked: int = 0
    num_boms: int = 0
    num_spelled: int = 0
    num_split: int = 0
    bad_examples: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, other: "Totals") -> None:
        """Adds what came after this."""
        before, after = self.position, other.position
        assert (before.source, before.num_records) <= (after.source, after.num_records)
        self.position = after
        for source, splits in other.sources.items():
            for split, counts in splits.items():
                add_counts(self.sources, source, split, counts)
        for name, splits in other.sets.items():
            for split, counts in splits.items():
                add_counts(self.sets, name, split, counts)
        self.ended |= other.ended
        self.num_seen += other.num_seen
        self.num_bad += other.num_bad
        self.num_empty += other.num_empty
        self.num_marked += other.num_marked
        self.num_boms += other.num_boms
        self.num_spelled += other.num_spelled
        self.num_split += other.num_split
        self.left_out += other.left_out
        self.bad_examples = [*self.bad_examples, *other.bad_examples][:MAX_BAD_EXAMPLES]

    def bounded(self, sets: dict[str, SplitCounts]) -> dict[str, SplitCounts]:
        """`sets`, with those that would be one too many for this counted under one name."""
        known = set(self.sets)
        result: dict[str, SplitCounts] = {}
        for name, splits in sets.items():
            if len(known) < MAX_SETS:
                known.add(name)
            for split, counts in splits.items():
                add_counts(result, name if name in known else OTHER_SETS, split, counts)
        return result


def split_counts(sources: dict[int, SplitCounts]) -> SplitCounts:
    """The counts of all files together, for each split."""
    total = {split: Counts() for split in SPLITS}
    for splits in sources.values():
        for split, counts in splits.items():
            total[split].add(counts)
    return total


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is being made from what: the same plan gives the same store.

    Attributes:
        options: those that change the store and are not the default.
        inputs: path (see `names`) and size of each file.
        rules: counts up when the same files come to be read otherwise.
    """

    options: dict[str, str | float]
    inputs: list[tuple[str, int]]
    rules: int = 0

    def difference(self, other: "Plan") -> str | None:
        """The first thing in which `other`, the present plan, is not this one; None if there is
        none.

        A path may be another spelling of the same file, so only what it says of the kind counts:
        whether the content is the same is for the caller to see.
        """
        for name in dict.fromkeys([*self.options, *other.options]):
            before, now = (plan.options.get(name, "not given") for plan in (self, other))
            if before != now:
                return f"--{name.replace('_', '-')} was {before}, now {now}"
        if len(self.inputs) != len(other.inputs):
            return f"there were {len(self.inputs)} input files, now {len(other.inputs)}"
        for (path, size), (new_path, new_size) in zip(self.inputs, other.inputs, strict=True):
            if _kind_by_name(path) != _kind_by_name(new_path):
                return f"input {path} is now {new_path}"
            if size != new_size:
                now = "" if path == new_path else f"{new_path}: "
                return f"input {path} had {size} bytes, now {now}{new_size}"
        return None


def _kind_by_name(path: str) -> tuple[str | None, str | None]:
    name = from_json_name(path)
    return named_kind(name), named_compression(name)


class Workspace:
    """The folder `unfinished` of a store in the making, locked by this process."""

    def __init__(self, out: Path) -> None:
        self.path = out / UNFINISHED
        self._lock = -1

    def __enter__(self) -> "Workspace":
        """Raises BusyError if another process makes this store."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = files.open_folder(self.path.parent)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise BusyError(
                f"{self.path.parent}: another `meshlm data prepare` is at work here: wait for it"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.path.exists() and not any(self.path.iterdir()):
            self.remove()
        os.close(self._lock)

    def read_plan(self) -> Plan | None:
        """The plan of the work that was interrupted here, or None."""
        lines = self._lines()
        # A kill between the last two steps of publishing leaves a journal without its files.
        if not any((self.path / name).exists() for name in (TOKENIZER, MANIFEST)):
            return None
        return _decode(lines[0], Plan, self.path) if lines else None

    def begin(self, plan: Plan) -> None:
        """Begins new work, throwing away what was here."""
        shutil.rmtree(self.path)
        self.path.mkdir()
        files.replace(self.path / JOURNAL, msgspec.json.encode(plan) + b"\n")

    def read_totals(self) -> Totals:
        """What the work has made so far."""
        totals = Totals()
        for line in self._lines()[1:]:
            totals.add(_decode(line, Totals, self.path))
        return totals

    def remove(self) -> None:
        """Removes the workspace: the store is whole, or nothing was begun."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _lines(self) -> list[bytes]:
        journal = self.path / JOURNAL
        if not journal.exists():
            return []
        *whole, _ = files.read(journal).split(b"\n")  # a line is valid once its newline is there
        return whole


def _decode(line: bytes, kind: type[_Kind], path: Path) -> _Kind:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.MsgspecError as error:
        raise BadInputError(
            f"{path / JOURNAL}: damaged ({error}): begin again with --force"
        ) from None


class Appender:
    """Appends encoded batches to the growing files, and lines to the journal."""

    def __init__(self, folder: Path, totals: Totals, dtype: np.dtype) -> None:
        """Opens the files and cuts them to what `totals` counts.

        Raises:
            BadInputError: a file is shorter than that.
        """
        self.totals = totals
        self._since = Totals(position=self.totals.position)
        self._files: dict[str, BinaryIO] = {}
        self._num_tokens: dict[str, int] = {}
        with contextlib.ExitStack() as opened:
            for split, counts in split_counts(totals.sources).items():
                sizes = {
                    tokens_file(split): counts.num_tokens * dtype.itemsize,
                    documents_file(split): counts.num_documents * 8,
                }
                for name, size in sizes.items():
                    self._files[name] = opened.enter_context(_open_cut(folder / name, size))
                self._num_tokens[split] = counts.num_tokens
            self._journal = opened.enter_context(files.update(folder / JOURNAL))
            whole = self._journal.read()
            self._journal.seek(whole.rfind(b"\n") + 1)
            self._journal.truncate()
            files.sync_folder(folder)
            self._opened = opened.pop_all()

    def append(self, encoded: Encoded, totals: Totals) -> None:
        """Adds a batch: its tokens, and `totals`, which count it."""
        for split in SPLITS:
            starts = encoded.starts[split] + np.uint64(self._num_tokens[split])
            self._files[documents_file(split)].write(starts.astype(DOCUMENT_DTYPE).tobytes())
            self._files[tokens_file(split)].write(encoded.tokens[split])
            self._num_tokens[split] += sum(
                splits[split].num_tokens for splits in encoded.sources.values() if split in splits
            )
        self.totals.add(totals)
        self._since.add(totals)

    def flush(self) -> None:
        """Makes all that was appended durable: first the tokens, then the line that counts them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._journal.write(msgspec.json.encode(self._since) + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._since = Totals(position=self.totals.position)

    def close(self) -> None:
        """Closes the files; what was not flushed is made again next time."""
        self._opened.close()


def _open_cut(path: Path, size: int) -> BinaryIO:
    """Returns a growing file, cut to `size` bytes; what is written follows them."""
    file = files.update(path, make=True)
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise BadInputError(f"{path}: shorter than its journal says: begin again with --force")
    file.truncate(size)
    file.seek(size)
    return file
