"""Git LFS's pointers: small texts that lie in place of files which were not fetched."""

import re
from pathlib import Path

from meshlm.core.errors import BadInputError

_BEGINNING = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/v")
_MAX_POINTER_BYTES = 1024


def begins_as_pointer(head: bytes) -> bool:
    """Returns whether a file that begins so is a pointer."""
    return _BEGINNING.match(head) is not None


def is_pointer(path: Path) -> bool:
    """Returns whether a file is a pointer; False for what cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return begins_as_pointer(file.read(_MAX_POINTER_BYTES))
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """Raises BadInputError where a file is a pointer."""
    if is_pointer(path):
        raise BadInputError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
            f"{path.parent}, or download it again"
        )
