"""`manifest.json`: what a checkpoint holds, and the check that it still holds it."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshlm.checkpoint.folder import ARRAYS_NAME, MANIFEST_NAME, reading
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.files import sync_folder

FORMAT_NAME = "meshlm-checkpoint"
FORMAT_VERSION = 1

_RECORDED_LIBRARIES = ("meshlm", "jax", "jaxlib", "numpy", "orbax-checkpoint")
_HASH_THREADS = 4


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
    files: Mapping[str, FileInfo]

    def to_json(self) -> bytes:
        """The canonical bytes of `manifest.json`, its own checksum included."""
        content = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "step": self.step,
            "versions": dict(self.versions),
            "arrays": {
                name: {"shape": list(info.shape), "dtype": info.dtype}
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
    """missing, changed or unexpected"""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file} is {self.kind}" + (f" ({self.detail})" if self.detail else "")


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide what a checkpoint's bytes mean."""
    return {name: importlib.metadata.version(name) for name in _RECORDED_LIBRARIES}


def hash_files(folder: Path, *, sync: bool = False) -> dict[str, FileInfo]:
    """Length and SHA-256 of every file under a folder but its manifest, read once.

    With `sync` each file and folder is on disk when this returns.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in paths]
    wanted = [(n, p) for n, p in zip(names, paths, strict=True) if n != MANIFEST_NAME]
    with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="checkpoint-hash") as pool:
        infos = list(pool.map(lambda item: _hash_file(item[1], sync), wanted))
    if sync:
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            sync_folder(path)
    return {name: info for (name, _), info in zip(wanted, infos, strict=True)}


def hash_bytes(data: bytes) -> FileInfo:
    """Length and SHA-256 of a file with these bytes."""
    return FileInfo(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_manifest(step_folder: Path) -> Manifest:
    """The manifest of a step's folder.

    Raises: UsageError where there is no checkpoint; BadInputError where the manifest is damaged or
    of a newer format version.
    """
    try:
        data = (step_folder / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"no checkpoint at {step_folder}: it has no {MANIFEST_NAME}; give a step_N folder"
        ) from None
    content = _unseal(data)
    if content is None:
        raise BadInputError(
            f"checkpoint {step_folder}: {MANIFEST_NAME} is damaged; use another step"
        )
    if content["version"] > FORMAT_VERSION:
        raise BadInputError(
            f"checkpoint {step_folder}: format version {content['version']} is newer than the "
            f"newest one this MeshLM reads, {FORMAT_VERSION}; install a newer MeshLM"
        )
    return _from_content(content)


def verify(step_folder: Path) -> list[Damage]:
    """Every file that is missing, changed or unexpected, all bytes re-read; empty when it is good.

    Raises: UsageError where there is no such folder; BadInputError for a newer format version.
    """
    if not step_folder.is_dir():
        raise UsageError(f"no checkpoint at {step_folder}; give a step_N folder")
    if not (step_folder / MANIFEST_NAME).is_file():
        return [Damage(file=MANIFEST_NAME, kind="missing")]
    with reading(step_folder):
        if _unseal((step_folder / MANIFEST_NAME).read_bytes()) is None:
            return [Damage(file=MANIFEST_NAME, kind="changed", detail="its own checksum is wrong")]
        wanted = read_manifest(step_folder).files
        found = hash_files(step_folder)
    return list(_differences(wanted, found))


def read_files(step_folder: Path) -> dict[str, bytes]:
    """The small files saved beside the arrays, by name, each checked against the manifest.

    Raises: UsageError, BadInputError as `read_manifest`; BadInputError for a damaged file.
    """
    manifest = read_manifest(step_folder)
    result = {}
    for name, info in manifest.files.items():
        if "/" in name:
            continue
        path = step_folder / name
        data = path.read_bytes() if path.is_file() else None
        if data is None or hashlib.sha256(data).hexdigest() != info.sha256:
            kind = "missing" if data is None else "changed"
            raise BadInputError(f"checkpoint {step_folder}: {name} is {kind}; use another step")
        result[name] = data
    return result


def check_file_names(names: Iterable[str]) -> None:
    """Raises ValueError for a name that could not lie beside the arrays."""
    for name in names:
        if name in (MANIFEST_NAME, ARRAYS_NAME) or name.startswith(".") or "/" in name or not name:
            raise ValueError(f"file name {name!r} cannot be used in a checkpoint; choose another")


def _differences(wanted: Mapping[str, FileInfo], found: Mapping[str, FileInfo]) -> Iterable[Damage]:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield Damage(file=name, kind="missing")
        elif name not in wanted:
            yield Damage(file=name, kind="unexpected")
        elif found[name].num_bytes != wanted[name].num_bytes:
            lengths = f"{found[name].num_bytes} bytes instead of {wanted[name].num_bytes}"
            yield Damage(file=name, kind="changed", detail=lengths)
        elif found[name].sha256 != wanted[name].sha256:
            yield Damage(file=name, kind="changed", detail="its checksum is wrong")


def _hash_file(path: Path, sync: bool) -> FileInfo:
    with open(path, "rb") as file:
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
        content = json.loads(data)
        claimed = content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    # Comparing the bytes again refuses what JSON would forgive: spaces, repeated keys, escapes.
    if not isinstance(claimed, str) or _seal(content) != data:
        return None
    known = content.get("format") == FORMAT_NAME and isinstance(content.get("version"), int)
    return content if known else None


def _from_content(content: Mapping[str, Any]) -> Manifest:
    try:
        return Manifest(
            step=int(content["step"]),
            versions={str(k): str(v) for k, v in content["versions"].items()},
            arrays={
                name: ArrayInfo(shape=tuple(map(int, a["shape"])), dtype=str(a["dtype"]))
                for name, a in content["arrays"].items()
            },
            files={
                name: FileInfo(num_bytes=int(f["bytes"]), sha256=str(f["sha256"]))
                for name, f in content["files"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(
            f"checkpoint: {MANIFEST_NAME} is not of format version {content['version']}: {error}"
        ) from None
