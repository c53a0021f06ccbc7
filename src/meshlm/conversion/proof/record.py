"""Weights held against what was recorded of their bytes: by a conversion, or by a download.

A folder that `meshlm convert` wrote has the SHA-256 of every tensor and of every other file in its
certificate.json. A folder that came from the Hugging Face hub has checksums of whole files: in the
names of the blobs to which a cache's links lead, or in `.cache/huggingface` of a folder that was
downloaded by itself. A checkpoint of MeshLM's has its manifest, which is checked whenever it is
opened.

Source: huggingface_hub 1.7, file_download.py and _local_folder.py.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meshlm.conversion.proof.certificate import CERTIFICATE_FILE, RawTensor, hash_file, raw_tensors
from meshlm.conversion.source import Source
from meshlm.core import strict_json
from meshlm.core.errors import BadInputError, UsageError

# A full checkpoint of the original's, of 8 shards and 28 layers, has 8 MB of them.
MAX_CERTIFICATE_BYTES = 256 << 20
_HUB_FOLDER = ".cache/huggingface/download"
_MAX_METADATA_BYTES = 4096
# Git's SHA-1 of a small file, SHA-256 of a large one.
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BLOCK_BYTES = 4 << 20
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What certificate.json says of the folder in which it lies."""

    path: Path
    """Of certificate.json."""
    tensors: Mapping[str, RawTensor]
    """By the name that the format gives them."""
    files: Mapping[str, str]
    """SHA-256 of the files that hold no tensors."""

    def check_files(self) -> None:
        """Raises BadInputError where a file is missing or not as it was written."""
        for name, wanted in self.files.items():
            file = self.path.parent / name
            if not file.is_file():
                raise BadInputError(f"{file} is missing: {self._remedy}")
            if hash_file(file) != wanted:
                raise BadInputError(f"{file} is not as it was written: {self._remedy}")

    def check_tensors(self, found: Mapping[str, RawTensor], where: Path) -> None:
        """Raises BadInputError where a tensor is not as it was written.

        Args:
            found: some of the tensors of a source.
            where: what messages call the source.
        """
        for name, tensor in found.items():
            if tensor != self.tensors.get(name):
                raise BadInputError(f"{where}: {name} is not as it was written: {self._remedy}")

    @property
    def _remedy(self) -> str:
        return (
            f"{self.path} has another SHA-256 of it; get it again or convert again, or, where it "
            f"was changed on purpose, delete {self.path.name}"
        )


def find_record(source: Source) -> Record | None:
    """Returns what the certificate beside a source says of it; None where there is none.

    None for checkpoints of MeshLM's too, whose manifest covers the certificate and all else.

    Raises:
        BadInputError: the certificate cannot be read.
    """
    if source.kind == "meshlm" or not source.path.is_dir():
        return None
    # A step's folder of the original's lies in the folder that was written.
    for folder in (source.path, source.path.absolute().parent):
        path = folder / CERTIFICATE_FILE
        if path.is_file():
            return _read_record(path, source.kind)
        if os.path.lexists(path):
            raise BadInputError(
                f"{path} is no file, or a link that leads to none: get it again, or delete it to "
                "use the weights unchecked"
            )
        if source.kind != "mtj":
            break
    return None


def check_all(source: Source) -> list[str]:
    """Returns what all bytes of a source were held against, in words; empty where nothing is known.

    Every tensor is read, and refused where it is not finite.

    Raises:
        BadInputError: something is not as it was recorded.
    """
    record, proofs, count = find_record(source), [], 0
    if record is not None:
        record.check_files()
    for group in source.groups:
        for part in source.parts(group):
            for name in part.tensors:
                part.read_finite(name)
            if record is not None:
                record.check_tensors(raw_tensors(part), source.path)
            count += len(part.raw)
    if source.kind == "meshlm":
        proofs.append("its manifest")
    if record is not None:
        beside = f" and {len(record.files)} files beside them" if record.files else ""
        proofs.append(f"{CERTIFICATE_FILE}: {count} tensors{beside}")
    checked = _check_downloads(source.path)
    if checked:
        proofs.append(f"the checksums of the download: {', '.join(checked)}")
    return proofs


def require_proof(source: Source) -> None:
    """Reads every byte of a source, and returns where all is as it was recorded.

    Raises:
        UsageError: nothing is recorded of it.
        BadInputError: something is not as it was recorded.
    """
    if not check_all(source):
        raise UsageError(
            f"--verify: {source.path} has neither the {CERTIFICATE_FILE} of meshlm convert nor "
            "the checksums of a download to be held against: leave --verify out"
        )


def _read_record(path: Path, kind: str) -> Record:
    try:
        content = strict_json.read_object(path, max_bytes=MAX_CERTIFICATE_BYTES)
        side: dict[str, Any] = content["destination"]
        if content["certificate"] != 1 or side["format"] != kind:
            raise ValueError(f"of another format than {kind}")
        tensors = {
            str(name): RawTensor(
                dtype=str(tensor["dtype"]),
                shape=tuple(map(int, tensor["shape"])),
                sha256=str(tensor["sha256"]),
            )
            for name, tensor in side["tensors"].items()
        }
        files = {_plain(name): str(digest) for name, digest in side.get("sha256", {}).items()}
    except _MALFORMED as error:
        raise BadInputError(
            f"{path} is not a certificate of the weights beside it ({str(error)[:100]}): get it "
            "again, or delete it to use the weights unchecked"
        ) from None
    return Record(path=path, tensors=tensors, files=files)


def _plain(name: Any) -> str:
    """Returns the name of a file inside a folder; raises ValueError for a way out of it."""
    path = Path(str(name))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("a file outside of its folder")
    return str(name)


def _check_downloads(folder: Path) -> list[str]:
    """Returns the names of the files whose checksum is known, and holds."""
    if not folder.is_dir():
        return []
    checked = []
    for path in sorted(folder.iterdir()):
        for wanted, recorded_in in _checksums(folder, path):
            if _hash_as(path, wanted) != wanted:
                raise BadInputError(
                    f"{path} is not what was downloaded: {recorded_in} has another checksum of it; "
                    "download it again, or, where it was changed on purpose, check it by other "
                    "means"
                )
            checked.append(path.name)
    return checked


def _checksums(folder: Path, path: Path) -> Iterator[tuple[str, Path]]:
    """Yields the checksum that is known of a file, and where that is written; at most one."""
    if not path.is_file():
        return
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _CHECKSUM.fullmatch(blob.name):
        yield blob.name, blob
        return
    metadata = folder / _HUB_FOLDER / f"{path.name}.metadata"
    if metadata.is_file():
        with metadata.open("rb") as file:
            lines = file.read(_MAX_METADATA_BYTES).decode(errors="replace").splitlines()
        if len(lines) >= 2 and _CHECKSUM.fullmatch(lines[1].strip()):
            yield lines[1].strip(), metadata


def _hash_as(path: Path, wanted: str) -> str:
    """Returns a file's checksum of the kind that `wanted` is."""
    if len(wanted) == 64:
        return hash_file(path)
    # As git names a file: its length stands before its bytes.
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
