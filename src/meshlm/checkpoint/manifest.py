"""`manifest.json`: what a checkpoint holds, and the check that it still holds it."""

import errno
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from meshlm.checkpoint import format_1
from meshlm.checkpoint.folder import ARRAYS_NAME, MANIFEST_NAME, reading
from meshlm.core import strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.files import is_litter, open_plain, read, sync_folder

FORMAT_NAME = "meshlm-checkpoint"
FORMAT_VERSION = 2

# What Orbax and TensorStore look for by name. They follow names from one file to the next and read
# no others: what has another name changes no number. tests/unit/test_stray_files.py tries it.
_READ_BY_NAME = re.compile(
    rf"{ARRAYS_NAME}/(_[A-Z_]+|orbax\.checkpoint|commit_success\.txt"
    r"|state(/(_METADATA|_sharding|array_metadatas(/process_[^/]*)?"
    r"|(ocdbt\.process_[^/]+/)?(manifest\.(ocdbt|[0-9a-f]{16})|d/[0-9a-f]{32})))?)"
)
_RECORDED_LIBRARIES = ("meshlm", "jax", "jaxlib", "numpy", "orbax-checkpoint")
_HASH_THREADS = 4
_MAX_SMALL_FILE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One stored array's logical shape and dtype name."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One file's length in bytes and its SHA-256 in hex."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's table of contents. File names are relative, with `/` between folders."""

    step: int
    versions: Mapping[str, str]
    arrays: Mapping[str, ArrayInfo]
    """By the names of today's format, whatever the version."""
    files: Mapping[str, FileInfo]
    format_version: int = FORMAT_VERSION

    def stored_name(self, name: str) -> str:
        """Returns the name under which the checkpoint's files have an array."""
        return format_1.to_format_1(name) if self.format_version == 1 else name

    def to_json(self) -> bytes:
        """The canonical bytes of `manifest.json`, its own checksum included."""
        content = {
            "format": FORMAT_NAME,
            "version": self.format_version,
            "step": self.step,
            "versions": dict(self.versions),
            "arrays": {
                self.stored_name(name): {"shape": list(info.shape), "dtype": info.dtype}
                for name, info in self.arrays.items()
            },
            "files": {
                name: {"bytes": info.num_bytes, "sha256": info.sha256}
                for name, info in self.files.items()
            },
        }
        return _seal(content)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file of a checkpoint that is not as it was written."""

    file: str
    kind: str
    """missing, changed or unexpected: not in the manifest, but under a name that is read"""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file} is {self.kind}" + (f" ({self.detail})" if self.detail else "")


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide what a checkpoint's bytes mean."""
    return {name: importlib.metadata.version(name) for name in _RECORDED_LIBRARIES}


def hash_files(folder: Path, small_files: Iterable[str]) -> dict[str, FileInfo]:
    """Length and SHA-256 of the small files and of all below `arrays`, read once and on disk.

    What a file manager leaves there in the meantime is none of the checkpoint's.
    """
    found = (name for name, is_folder in _walk(folder) if not is_folder)
    names = sorted(
        {*small_files}
        | {n for n in found if n.startswith(f"{ARRAYS_NAME}/") and not _is_foreign(n)}
    )
    with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="checkpoint-hash") as pool:
        infos = list(pool.map(lambda name: _hash_file(folder / name, sync=True), names))
    for name in (".", *(name for name, is_folder in _walk(folder) if is_folder)):
        sync_folder(folder / name)
    return dict(zip(names, infos, strict=True))


def hash_bytes(data: bytes) -> FileInfo:
    """Length and SHA-256 of a file with these bytes."""
    return FileInfo(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_manifest(step_folder: Path) -> Manifest:
    """The manifest of a step's folder.

    Raises: UsageError where there is no checkpoint; BadInputError where the manifest is damaged or
    of a newer format version.
    """
    try:
        data = read(step_folder / MANIFEST_NAME, strict_json.MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"no checkpoint at {step_folder}: it has no {MANIFEST_NAME}; give a step_N folder"
        ) from None
    content = _unseal(data)
    if content is None:
        raise BadInputError(
            f"checkpoint {step_folder}: {MANIFEST_NAME} is damaged; use another checkpoint"
        )
    if content["version"] > FORMAT_VERSION:
        raise BadInputError(
            f"checkpoint {step_folder}: format version {content['version']} is newer than the "
            f"newest one this MeshLM reads, {FORMAT_VERSION}; install a newer MeshLM"
        )
    return _from_content(content)


def verify(step_folder: Path) -> list[Damage]:
    """Every file of the checkpoint that is missing or changed, all bytes re-read; empty when good.

    Other files are damage only where they would be read in place of its own; see `stray_files`.

    Raises:
        UsageError: there is no such folder.
        BadInputError: the format version is newer.
        OSError: a file cannot be read now; that says nothing about what is in it.
    """
    if not step_folder.is_dir():
        raise UsageError(f"no checkpoint at {step_folder}; give a step_N folder")
    try:
        data = read(step_folder / MANIFEST_NAME, strict_json.MAX_BYTES)
    except FileNotFoundError:
        return [Damage(file=MANIFEST_NAME, kind="missing")]
    except (UsageError, IsADirectoryError):
        return [Damage(file=MANIFEST_NAME, kind="changed", detail="it is no file")]
    except BadInputError:
        return [Damage(file=MANIFEST_NAME, kind="changed", detail="it is too large")]
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return [Damage(file=MANIFEST_NAME, kind="changed", detail="it is a link to itself")]
    if _unseal(data) is None:
        return [Damage(file=MANIFEST_NAME, kind="changed", detail="its own checksum is wrong")]
    with reading(step_folder):
        wanted = read_manifest(step_folder).files
        with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="checkpoint-hash") as pool:
            compared = pool.map(lambda name: _compare(step_folder, name, wanted[name]), wanted)
            damage = [one for one in compared if one is not None]
        damage += [
            Damage(file=name, kind="unexpected")
            for name, is_folder in _walk(step_folder)
            if _READ_BY_NAME.fullmatch(name)
            and not _is_of(wanted, name)
            and not (is_folder and name.endswith("/array_metadatas"))
        ]
    return sorted(damage, key=lambda one: one.file)


def stray_files(step_folder: Path) -> list[str]:
    """Names of the files that are none of the checkpoint's and are never read, in order.

    Raises: as `read_manifest`.
    """
    known = {*read_manifest(step_folder).files, MANIFEST_NAME}
    return sorted(
        name
        for name, is_folder in _walk(step_folder)
        if not (is_folder or name in known or _READ_BY_NAME.fullmatch(name))
    )


def read_files(step_folder: Path) -> dict[str, bytes]:
    """The small files saved beside the arrays, by name, each checked against the manifest.

    Raises: UsageError, BadInputError as `read_manifest`; BadInputError for a damaged file.
    """
    manifest = read_manifest(step_folder)
    result = {}
    for name, info in manifest.files.items():
        if "/" in name:
            continue
        kind = "changed"
        try:
            data = read(step_folder / name, min(info.num_bytes, _MAX_SMALL_FILE_BYTES))
        except FileNotFoundError:
            data, kind = None, "missing"
        except BadInputError:
            data = None
        if data is None or hashlib.sha256(data).hexdigest() != info.sha256:
            raise BadInputError(
                f"checkpoint {step_folder}: {name} is {kind}; use another checkpoint"
            )
        result[name] = data
    return result


def check_file_names(names: Iterable[str]) -> None:
    """Raises ValueError for a name that could not lie beside the arrays."""
    for name in names:
        if name in (MANIFEST_NAME, ARRAYS_NAME) or name.startswith(".") or "/" in name or not name:
            raise ValueError(f"file name {name!r} cannot be used in a checkpoint; choose another")


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yields the name of everything below a folder, and whether it is a folder; links are none.

    Raises:
        OSError: a folder cannot be read now. (`Path.rglob` would leave it out.)
    """

    def fail(error: OSError) -> None:
        raise error

    for path, folders, names in os.walk(folder, onerror=fail):
        here = PurePosixPath(os.path.relpath(path, folder))
        for name in (*folders, *names):
            is_folder = name in folders and not os.path.islink(os.path.join(path, name))
            yield str(here / name), is_folder


def _is_foreign(name: str) -> bool:
    """Whether no file of Orbax's or TensorStore's is named so."""
    return any(part.startswith(".") or is_litter(part) for part in name.split("/"))


def _is_of(wanted: Mapping[str, FileInfo], name: str) -> bool:
    """Whether a name is one of a checkpoint's files, or a folder of one."""
    return name in wanted or any(other.startswith(f"{name}/") for other in wanted)


def _compare(step_folder: Path, name: str, wanted: FileInfo) -> Damage | None:
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts:
        return Damage(file=name, kind="missing")
    try:
        found = _hash_file(step_folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return Damage(file=name, kind="missing")
    except (UsageError, IsADirectoryError):
        return Damage(file=name, kind="changed", detail="it is no file")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return Damage(file=name, kind="changed", detail="it is a link to itself")
    if found.num_bytes != wanted.num_bytes:
        lengths = f"{found.num_bytes} bytes instead of {wanted.num_bytes}"
        return Damage(file=name, kind="changed", detail=lengths)
    if found.sha256 != wanted.sha256:
        return Damage(file=name, kind="changed", detail="its checksum is wrong")
    return None


def _hash_file(path: Path, *, sync: bool = False) -> FileInfo:
    with open_plain(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return FileInfo(num_bytes=file.tell(), sha256=digest)


def _dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"


def _seal(content: Mapping[str, Any]) -> bytes:
    return _dump({**content, "sha256": hashlib.sha256(_dump(content)).hexdigest()})


def _unseal(data: bytes) -> dict[str, Any] | None:
    """The content of a manifest, or None unless every byte is as it was written."""
    try:
        content = strict_json.parse_object(data, MANIFEST_NAME)
        claimed = content.pop("sha256")
    except (strict_json.JsonError, KeyError):
        return None
    # Comparing the bytes again refuses what JSON would forgive: spaces, repeated keys, escapes.
    if not isinstance(claimed, str) or _seal(content) != data:
        return None
    known = content.get("format") == FORMAT_NAME and isinstance(content.get("version"), int)
    return content if known else None


def _from_content(content: Mapping[str, Any]) -> Manifest:
    version = content["version"]
    try:
        return Manifest(
            step=int(content["step"]),
            versions={str(k): str(v) for k, v in content["versions"].items()},
            arrays={
                format_1.to_current(name) if version == 1 else name: ArrayInfo(
                    shape=tuple(map(int, a["shape"])), dtype=str(a["dtype"])
                )
                for name, a in content["arrays"].items()
            },
            files={
                name: FileInfo(num_bytes=int(f["bytes"]), sha256=str(f["sha256"]))
                for name, f in content["files"].items()
            },
            format_version=version,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInputError(
            f"checkpoint: {MANIFEST_NAME} is not of format version {version}: {error}"
        ) from None
