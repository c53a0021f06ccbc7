"""Input files: what the PATHs of `meshlm data prepare` stand for, in a fixed order."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshlm.core.errors import UsageError

_COMPRESSED = {
    ".gz": ".gz",
    ".tgz": ".gz",
    ".xz": ".xz",
    ".txz": ".xz",
    ".zst": ".zst",
    ".zstd": ".zst",
}
_SKIPPED_FOLDERS = ("__pycache__",)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read.

    Attributes:
        path: as the user gave it, or below the folder that the user gave.
        size_bytes: on disk.
        modified_ns: time of the last change.
        named: given by name or by a pattern, not found in a folder: then a binary file is an error,
        not a bystander.
    """

    path: str
    size_bytes: int
    modified_ns: int
    named: bool


def compression_of(path: str) -> str | None:
    """The compression that the name tells, one of .gz .xz .zst, or None."""
    return _COMPRESSED.get(os.path.splitext(path)[1].lower())


def format_of(path: str) -> str:
    """What is inside, by the name without its compression: "jsonl", "parquet", "tar" or "text"."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in (".tgz", ".txz"):
        return "tar"
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "tar"}
    return known.get(suffix, "text")


def is_hidden(path: str) -> bool:
    """Whether a folder walk passes over it: a name that begins with a dot, or a cache of
    bytecode."""
    parts = path.split("/")
    return any((p.startswith(".") and p not in (".", "..")) or p in _SKIPPED_FOLDERS for p in parts)


def find_inputs(paths: Sequence[str], *, exclude: Path) -> list[InputFile]:
    """The files that `paths` stand for: in the order given, folders and patterns sorted, each file
    once.

    Folders are walked to the bottom, through links too, without hidden names and without `exclude`
    (the output).

    Raises:
        UsageError: a path that is not there, a pattern or a folder without a file, something that
        is no file.
    """
    if not paths:
        raise UsageError("no input given: name files, folders or patterns, for example corpus/")
    found: dict[tuple[int, int], InputFile] = {}
    for given in paths:
        count = 0
        for path, named in _expand(given, os.path.realpath(exclude)):
            status = _status(path)
            count += 1
            found.setdefault(
                (status.st_dev, status.st_ino),
                InputFile(
                    path=path,
                    size_bytes=status.st_size,
                    modified_ns=status.st_mtime_ns,
                    named=named,
                ),
            )
        if not count:
            raise UsageError(f"{given}: no file found there")
    return list(found.values())


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot read it ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: not a regular file; give files, folders or patterns")
    return status


def _expand(given: str, exclude: str) -> Iterator[tuple[str, bool]]:
    if os.path.isdir(given):
        yield from ((path, False) for path in _walk(given, exclude, set()))
    elif os.path.lexists(given) or not glob.has_magic(given):
        yield given, True
    else:
        for match in sorted(glob.glob(given, recursive=True)):
            if os.path.isdir(match):
                # `**` matches folders besides the files in them
                if "**" not in given:
                    yield from ((path, False) for path in _walk(match, exclude, set()))
            else:
                yield match, True


def _walk(folder: str, exclude: str, above: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real == exclude or real in above:  # a link that leads back up would never end
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise UsageError(f"{folder}: cannot list it ({error.strerror})") from None
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, exclude, above | {real})
        elif entry.is_file():
            yield entry.path
