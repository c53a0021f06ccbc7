"""Input files: what the PATHs of `meshlm data prepare` stand for, in a fixed order."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshlm.core.errors import UsageError
from meshlm.data.folders import BOOKKEEPING_FOLDERS, FolderPlan, plan_folder

_SKIPPED_FOLDERS = ("__pycache__",)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read.

    Attributes:
        path: as the user gave it, or below the folder that the user gave. Bytes that are not UTF-8
            are surrogates, as in all paths of Python.
        size_bytes: on disk.
        modified_ns: time of the last change.
        named: given by name or by a pattern, not found in a folder: then a binary file is an error,
            not a bystander.
    """

    path: str
    size_bytes: int
    modified_ns: int
    named: bool


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file, folder or archive member that is not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files to read, in order, and what is left out beside them."""

    files: list[InputFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def is_hidden(path: str) -> bool:
    """Whether a folder walk passes over it: a name that begins with a dot, or a cache of
    bytecode."""
    parts = path.split("/")
    return any((p.startswith(".") and p not in (".", "..")) or p in _SKIPPED_FOLDERS for p in parts)


def find_inputs(paths: Sequence[str], *, exclude: Path) -> Inputs:
    """The files that `paths` stand for: in the order given, folders and patterns sorted, each file
    once.

    Folders are walked to the bottom, through links too, without hidden names and without `exclude`
    (the output). Links that lead nowhere or back up, what is no file, and bookkeeping (see
    `folders`) are left out.

    Raises:
        UsageError: a path that is not there, a pattern or a folder without a file, something that
            is no file.
        BadInputError: a dataset that cannot be read as its metadata says.
    """
    if not paths:
        raise UsageError("no input given: name files, folders or patterns, for example corpus/")
    files: dict[tuple[int, int], InputFile] = {}
    left_out: dict[str, LeftOut] = {}
    for given in paths:
        count, skipped = 0, None
        for found, named in _expand(given, _identity(str(exclude))):
            if isinstance(found, LeftOut):
                left_out.setdefault(found.path, found)
                skipped = skipped or found
                continue
            status = _status(found)
            count += 1
            files.setdefault(
                (status.st_dev, status.st_ino),
                InputFile(
                    path=found,
                    size_bytes=status.st_size,
                    modified_ns=status.st_mtime_ns,
                    named=named,
                ),
            )
        if not count:
            why = f" but what is left out ({skipped.path}: {skipped.reason})" if skipped else ""
            raise UsageError(f"{given}: no file found there{why}")
    return Inputs(files=list(files.values()), left_out=list(left_out.values()))


_Found = str | LeftOut


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        raise UsageError(f"{path}: cannot read it ({_reason(path)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: not a regular file; give files, folders or patterns")
    return status


def _reason(path: str) -> str | None:
    """The reason why what a path names is neither a file nor a folder, or None."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if not os.path.islink(path):
            return getattr(error, "strerror", None) or str(error)
        is_gone = isinstance(error, FileNotFoundError)
        return f"a symbolic link {'to nowhere' if is_gone else 'in a circle'}"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not a regular file"


def _identity(path: str) -> tuple[int, int] | None:
    """What is the same for all spellings of a path; None if nothing is there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _expand(given: str, exclude: tuple[int, int] | None) -> Iterator[tuple[_Found, bool]]:
    if os.path.isdir(given):
        yield from ((found, False) for found in _walk(given, exclude))
    elif os.path.lexists(given) or not glob.has_magic(given):
        yield given, True
    else:
        yield from _matches(given, exclude)


def _matches(pattern: str, exclude: tuple[int, int] | None) -> Iterator[tuple[_Found, bool]]:
    plans: dict[str, FolderPlan] = {}
    for match in sorted(glob.glob(pattern, recursive=True), key=os.fsencode):
        if os.path.isdir(match):
            # `**` matches folders besides the files in them
            if "**" not in pattern:
                yield from ((found, False) for found in _walk(match, exclude))
            continue
        folder, name = os.path.split(match)
        if folder not in plans:
            plans[folder] = plan_folder(folder, _names(folder or "."))
        plan = plans[folder]
        reason = plan.reason or plan.left_out.get(name) or _reason(match)
        for part in set(folder.split("/")) - set(pattern.split("/")):
            reason = BOOKKEEPING_FOLDERS.get(part, reason)
        yield (LeftOut(path=match, reason=reason) if reason else match), True


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder), key=os.fsencode)
    except OSError as error:
        raise UsageError(f"{folder}: cannot list it ({error.strerror})") from None


def _walk(top: str, exclude: tuple[int, int] | None) -> Iterator[_Found]:
    """The files below a folder, and what is left out; not recursive, for folders can be deep."""
    above: list[tuple[tuple[int, int] | None, Iterator[_Found]]] = []
    entered: str | None = top
    while entered is not None or above:
        if entered is not None:
            folder, identity, entered = entered, _identity(entered), None
            if identity is not None and identity == exclude:
                continue
            if any(identity == other for other, _ in above):  # it would never end
                yield LeftOut(path=folder, reason="a symbolic link to a folder that it is in")
                continue
            above.append((identity, _entries(folder)))
        entry = next(above[-1][1], None)
        if entry is None:
            above.pop()
        elif isinstance(entry, str) and entry.endswith("/"):
            entered = entry[:-1]
        else:
            yield entry


def _entries(folder: str) -> Iterator[_Found]:
    """The entries of a folder that are not hidden; folders end in a slash."""
    names = _names(folder)
    plan = plan_folder(folder, names)
    if plan.reason:
        yield LeftOut(path=folder, reason=plan.reason)
        return
    for name in dict.fromkeys([*plan.order, *names]):
        if is_hidden(name):
            continue
        path = os.path.join(folder, name)
        reason = plan.left_out.get(name) or _reason(path)
        if reason:
            yield LeftOut(path=path, reason=reason)
        else:
            yield path + "/" if os.path.isdir(path) else path
