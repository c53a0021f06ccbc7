"""A name for what answers: it changes when the weights or the code do."""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Files that say what the weights are: ours has a checksum of every array in its manifest.
_MANIFEST = "manifest.json"
_MOST_FILES = 10_000


def fingerprint(path: Path, *settings: str | None) -> str:
    """Returns `fp_` and 12 hex digits, of the weights' manifests or file sizes and of the version.

    `settings` are what else changes the answers, such as the type of the products.

    Weights are not read for it: files of one name and size count as the same, unless a manifest
    tells them apart.
    """
    digest = hashlib.sha256(repr((version("meshlm"), settings)).encode())
    for file in _files(path):
        name = "" if file == path else str(file.relative_to(path))
        digest.update(f"\0{name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        if file.name == _MANIFEST:
            digest.update(file.read_bytes())
    return f"fp_{digest.hexdigest()[:12]}"


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    manifests = sorted(path.rglob(_MANIFEST))[:_MOST_FILES]
    yield from manifests or sorted(f for f in path.iterdir() if f.is_file())[:_MOST_FILES]
