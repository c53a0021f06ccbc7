"""Files that MeshLM writes: never through a link that somebody else made, and never half there.

Others may be able to make names in a folder that is written to (a shared run folder, say). A link
of theirs under one of our names would lead a write into another file, and a named pipe would make
it wait for ever. So no other module opens a file for writing; a test holds this. Folders may be
links: where a run lies is the user's choice.
"""

import errno
import hashlib
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from meshlm.core.errors import BadInputError, UsageError

_PARTIAL = ".partial"
_BLOCK_BYTES = 1 << 20
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# What opening gives for a link, for a pipe without a reader or a socket, and for a device.
_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV)
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", ".directory", ".ipynb_checkpoints")
_LITTER_PREFIXES = ("._", ".nfs", ".fuse_hidden")


def create(path: Path) -> BinaryIO:
    """Returns a new file, open for writing.

    Raises:
        FileExistsError: there is something under this name, a link that leads nowhere included.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), "wb")


def write_new(path: Path, data: bytes) -> None:
    """Writes a new file. Its bytes are on disk when this returns; its name needs `sync_folder`.

    Raises:
        FileExistsError: there is something under this name.
    """
    with create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Puts a file in place of what had its name; both are on disk when this returns.

    A reader sees the old content or the new, never a part. A link under the name is replaced, not
    followed. The new content is first written to `NAME.partial`.
    """
    partial = partial_of(path)
    partial.unlink(missing_ok=True)
    try:
        write_new(partial, data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Returns the name under which `replace` writes; it may be left by a killed process."""
    return path.with_name(path.name + _PARTIAL)


def append(path: Path) -> BinaryIO:
    """Returns a file, made if it is not there, open for appending and not buffered.

    Raises:
        UsageError: it is no plain file, or has a second name.
    """
    return os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0)  # pyright: ignore[reportReturnType]


def update(path: Path, *, make: bool = False) -> BinaryIO:
    """Returns a file, open for reading and writing at any place; with `make`, made if need be.

    Raises:
        FileNotFoundError: it is not there.
        UsageError: it is no plain file, or has a second name.
    """
    return os.fdopen(_open(path, os.O_RDWR | (os.O_CREAT if make else 0)), "r+b")


def read(path: Path, max_bytes: int | None = None) -> bytes:
    """Returns the content of a file; its name may be a link.

    Args:
        max_bytes: no more is read: a file may claim any size and take none on the disk.

    Raises:
        FileNotFoundError: it is not there.
        UsageError: it is a named pipe, which would be waited for, or another thing without an end.
        BadInputError: it has more than `max_bytes`.
    """
    with open_plain(path) as file:
        if max_bytes is None:
            return file.read()
        data = bytearray()
        while block := file.read(_BLOCK_BYTES):
            data += block
            if len(data) > max_bytes:
                most = f"{max_bytes >> 20} MiB" if max_bytes >> 20 else f"{max_bytes:,} bytes"
                raise BadInputError(f"{path}: over {most}, too large for this file")
        return bytes(data)


def open_plain(path: Path) -> io.BufferedReader:
    """Returns a file, open for reading. Raises as `read`."""
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """Returns the descriptor of a file, for reading. Raises as `read`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    what = _kind(os.fstat(descriptor).st_mode)
    if what is not None:
        os.close(descriptor)
        raise UsageError(f"{path} is {what} and no file: delete it, or choose another folder")
    return descriptor


def read_at(descriptor: int, offset: int, target: memoryview) -> int:
    """Reads from `offset` on until `target` (of bytes) is full; returns how many bytes there were.

    It is fewer only where the file ends. Unlike a mapped file, one that is cut while it is read is
    no SIGBUS, which would end the process without a word.

    Raises:
        OSError: the file cannot be read now.
    """
    done = 0
    while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
        done += count
    return done


def hash_open(descriptor: int) -> str:
    """Returns the SHA-256, in hex, of an open file's whole content; its position stays."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK_BYTES, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def open_folder(path: Path) -> int:
    """Returns the descriptor of a folder, for locks and `fsync`."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = open_folder(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_litter(name: str) -> bool:
    """Whether a name is one that file managers, editors and file systems leave in any folder."""
    return name in _LITTER or name.startswith(_LITTER_PREFIXES) or name.endswith("~")


def _open(path: Path, flags: int) -> int:
    """Returns the descriptor of a plain file with one name; `flags` say how it is opened."""
    try:
        descriptor = os.open(path, flags | _FLAGS, 0o666)
    except OSError as error:
        what = _what_is_there(path) if error.errno in _NO_FILE else None
        if what is None:
            raise
        raise _refused(path, what) from None
    found = os.fstat(descriptor)
    what = _kind(found.st_mode)
    if what is None and found.st_nlink > 1:
        what = f"a file with {found.st_nlink} names (hard links)"
    if what is not None:
        os.close(descriptor)
        raise _refused(path, what)
    return descriptor


def _what_is_there(path: Path) -> str | None:
    try:
        return _kind(path.lstat().st_mode)
    except OSError:
        return None


def _kind(mode: int) -> str | None:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def _refused(path: Path, what: str) -> UsageError:
    remedy = "copy it, delete it and give the copy its name" if "names" in what else "delete it"
    return UsageError(
        f"{path} is {what}, and writing there could change something else: "
        f"{remedy}, or choose another folder"
    )
