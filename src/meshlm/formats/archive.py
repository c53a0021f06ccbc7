"""The files of a `.tar.zst`, one after the other, without unpacking it to disk.

Archives come from strangers. Only folders and plain files are accepted, under names that stay
inside the archive. A file larger than any checkpoint's is refused, and so is an archive that
inflates to more than weights do.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import zstandard

from meshlm.core import files
from meshlm.core.errors import BadInputError
from meshlm.formats.byte_source import ByteSource, Chunks, DamagedStreamError, RefusedStreamError
from meshlm.formats.npy import Body
from meshlm.formats.tar import FILE, FOLDER, Member, tar_members

MAX_FILE_BYTES = 64 << 30
MAX_FILES = 100_000
MAX_WINDOW_BYTES = 1 << 27
MAX_GROWTH = 100
"""An archive may inflate to this many times its own bytes, plus `FREE_BYTES`. A checkpoint whose
moments are still zero inflates to a little more than three times its bytes."""
FREE_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
}


class ArchivedFile(Body):
    """One file of an archive, read from front to back."""

    def __init__(self, member: Member, name: str, where: str) -> None:
        self.name, self.num_bytes = name, member.num_bytes
        self._member, self._where, self._returned = member, where, b""

    @property
    def left(self) -> int:
        """Returns the bytes that have not been taken."""
        return self._member.left + len(self._returned)

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.left:
            raise BadInputError(f"{self._where}: {self.name} is cut short; fetch the archive again")
        head, self._returned = self._returned[:num_bytes], self._returned[num_bytes:]
        with _stream_errors(self._where):
            rest = self._member.take(num_bytes - len(head))
        return head + rest if head else rest

    def give_back(self, data: bytes) -> None:
        """Returns the last bytes that were taken to the file."""
        self._returned = data + self._returned

    def skip(self, num_bytes: int) -> None:
        """Skips the next `num_bytes`."""
        while num_bytes:
            step = min(num_bytes, _CHUNK_BYTES)
            self.take(step)
            num_bytes -= step


def archived_files(path: Path) -> Iterator[ArchivedFile]:
    """Yields the files of an archive. Each can be read until the next one is requested.

    Raises:
        BadInputError: the archive is damaged, or holds a member that no checkpoint has.
    """
    where = str(path)
    with files.open_plain(path) as file:
        members = tar_members(ByteSource(_inflated(file, where)))
        seen: set[str] = set()
        while True:
            with _stream_errors(where):
                member = next(members, None)
            if member is None:
                return
            name = _checked_name(member, where)
            if name in seen:
                raise BadInputError(f"{where}: {name} is in it twice; refused")
            seen.add(name)
            if len(seen) > MAX_FILES:
                raise BadInputError(f"{where} has more than {MAX_FILES} files; refused")
            if member.kind == FILE:
                yield ArchivedFile(member, name, where)


def _inflated(file: BinaryIO, where: str) -> Chunks:
    """Yields the inflated bytes of the archive."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    reader = decompressor.stream_reader(file, read_across_frames=True, closefd=False)
    left = FREE_BYTES + MAX_GROWTH * os.fstat(file.fileno()).st_size
    while True:
        try:
            data = reader.read(_CHUNK_BYTES)
        except zstandard.ZstdError as error:
            raise BadInputError(
                f"{where} is no zstd archive, a damaged one, or needs a window beyond "
                f"{MAX_WINDOW_BYTES >> 20} MiB ({error}); fetch it again, or unpack it"
            ) from None
        if not data:
            return
        left -= len(data)
        if left < 0:
            raise BadInputError(
                f"{where} grows to more than {MAX_GROWTH} times its bytes, which weights do not; "
                "refused"
            )
        yield data


@contextlib.contextmanager
def _stream_errors(where: str) -> Iterator[None]:
    """Raises a BadInputError that names the archive for an error of its stream."""
    try:
        yield
    except EOFError:
        raise BadInputError(f"{where} is cut short; fetch the archive again") from None
    except DamagedStreamError as error:
        raise BadInputError(
            f"{where} holds no tar, or a damaged tar ({error}); fetch the archive again"
        ) from None
    except RefusedStreamError as error:
        raise BadInputError(f"{where}: {error}") from None


def _checked_name(member: Member, where: str) -> str:
    """Returns the normalised name of a file or folder; raises for any other member."""
    path = PurePosixPath(member.name)
    hidden = "\\" in member.name or not member.name.isprintable()
    if path.is_absolute() or ".." in path.parts or hidden:
        raise BadInputError(f"{where}: the name {member.name!r} leads out of the archive; refused")
    if member.kind not in (FILE, FOLDER):
        kind = _REFUSED_TYPES.get(member.kind, f"of tar's type {member.kind!r}")
        raise BadInputError(f"{where}: {member.name} is {kind}; only plain files are read: refused")
    limit = MAX_FILE_BYTES if member.kind == FILE else 0
    if member.num_bytes > limit:
        raise BadInputError(
            f"{where}: {member.name} claims {member.num_bytes} bytes; at most {limit} are read: "
            "refused"
        )
    return str(path)
