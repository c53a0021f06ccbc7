"""The folder that a conversion writes: hidden until it is whole."""

import fcntl
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from meshlm.checkpoint.folder import remove_tree
from meshlm.conversion.proof.certificate import CERTIFICATE_FILE
from meshlm.core.errors import UsageError
from meshlm.core.files import open_folder, sync_folder

_MARGIN = 1.05
_FIXED_BYTES = 32 * 1024 * 1024


class Destination:
    """A `with` block's folder, which gets its name when the block ends well, and goes if not."""

    def __init__(self, path: Path, source: Path, num_bytes: int, *, force: bool) -> None:
        """Args: num_bytes: what will be written, nearly.

        Raises:
            UsageError: something is at the path that may not be replaced, or the disk is too small.
        """
        self._path = path.absolute()
        self._parent = self._path.parent
        if self._parent.is_dir():
            self._clean_stale()
        _check_name(self._path, source, force)
        self._parent.mkdir(parents=True, exist_ok=True)
        _check_disk(self._parent, num_bytes)
        self._partial = self._parent / f"{self._prefix}{secrets.token_hex(4)}"
        self._replaced = self._partial.with_name(self._partial.name.replace("partial", "replaced"))
        self._lock: int | None = None

    def __enter__(self) -> Path:
        self._partial.mkdir()
        self._lock = _lock(self._partial)
        return self._partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            if self._partial.exists():
                remove_tree(self._partial)
            if self._lock is not None:
                os.close(self._lock)

    @property
    def _prefix(self) -> str:
        return f".{self._path.name}.partial-"

    def _publish(self) -> None:
        _sync_tree(self._partial)
        if self._path.exists():
            self._path.rename(self._replaced)
        try:
            self._partial.rename(self._path)
        except BaseException:
            if self._replaced.exists():
                self._replaced.rename(self._path)
            raise
        sync_folder(self._parent)
        if self._replaced.exists():
            remove_tree(self._replaced)

    def _clean_stale(self) -> None:
        """Removes what killed conversions to this name left: nobody holds it any more.

        Weights that were to be replaced, and were not, get their name back.
        """
        for path in list(self._parent.iterdir()):
            left = path.name.startswith((self._prefix, self._prefix.replace("partial", "replaced")))
            if not left or path.is_symlink() or not path.is_dir():
                continue
            lock = _lock(path)
            if lock is None:
                continue
            if path.name.startswith(self._prefix) or self._path.exists():
                remove_tree(path)
            else:
                path.rename(self._path)
            os.close(lock)


def _check_name(path: Path, source: Path, force: bool) -> None:
    if not path.name:
        raise UsageError(f"{path}: give a folder's name to write to")
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise UsageError(f"{path} is there already: choose another name, or add --force")
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path} is no folder: --force replaces weights only; choose another name")
    if source.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"{path} has the source in it: choose another name")
    if any(path.iterdir()) and not (path / CERTIFICATE_FILE).is_file():
        raise UsageError(
            f"{path} was not written by meshlm convert, and --force replaces nothing else: choose "
            "another name, or delete it yourself"
        )


def _check_disk(folder: Path, num_bytes: int) -> None:
    needed, free = int(num_bytes * _MARGIN) + _FIXED_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"too little disk at {folder}: {needed / 1e9:,.2f} GB are needed and "
            f"{free / 1e9:,.2f} GB are free; free some, or choose another destination"
        )


def _lock(folder: Path) -> int | None:
    """Returns the descriptor that holds a folder until it is closed; None where another has it.

    A process id would not do: in a container the next process often has that of the killed one.
    """
    try:
        descriptor = open_folder(folder)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # Held; or this file system has no locks, and what is left stays.
        os.close(descriptor)
        return None
    return descriptor


def _sync_tree(folder: Path) -> None:
    """Brings every file and name under a folder to disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
