"""A `.tar.zst` as a stream of files: one at a time, forwards, nothing on disk.

Archives come from strangers. Only folders and plain files are let through, under names that stay
where they are; what claims to be larger than any checkpoint, or grows more than weights can, is
refused before it fills the memory or the day.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import zstandard

from meshlm.core.errors import BadInputError
from meshlm.formats.npy import Body

MAX_FILE_BYTES = 64 << 30
MAX_FILES = 100_000
MAX_WINDOW_BYTES = 1 << 27
MAX_GROWTH = 100
"""The archive's bytes become no more than so many times as many, and `FREE_BYTES`. A checkpoint
whose moments are still zero grows a little more than three times."""
FREE_BYTES = 64 << 20
_MAX_NAME_BYTES = 64 << 10
_BLOCK = 512
_STEP = 1 << 20
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=\n]{1,255})=")
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
}


class ArchivedFile(Body):
    """One file of the archive, front to back."""

    def __init__(self, stream: "_Stream", name: str, num_bytes: int) -> None:
        self.name, self.num_bytes = name, num_bytes
        self._stream, self._left, self._returned = stream, num_bytes, b""

    @property
    def left(self) -> int:
        """Returns the bytes that have not been taken."""
        return self._left + len(self._returned)

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self.left:
            raise BadInputError(
                f"{self._stream.where}: {self.name} is cut short; fetch the archive again"
            )
        head, self._returned = self._returned[:num_bytes], self._returned[num_bytes:]
        rest = num_bytes - len(head)
        self._left -= rest
        return head + self._stream.take(rest) if head else self._stream.take(rest)

    def give_back(self, data: bytes) -> None:
        """Undoes the taking of the last bytes."""
        self._returned = data + self._returned

    def skip(self, num_bytes: int) -> None:
        """Passes over the next bytes."""
        while num_bytes:
            step = min(num_bytes, _STEP)
            self.take(step)
            num_bytes -= step


@dataclass(frozen=True)
class _Entry:
    name: str
    type: bytes
    num_bytes: int


def archived_files(path: Path) -> Iterator[ArchivedFile]:
    """Yields the files of an archive in turn; each may be read until the next is asked for.

    Raises:
        BadInputError: the archive is damaged, or has in it what no checkpoint has.
    """
    with open(path, "rb") as file:
        stream = _Stream(file, str(path))
        seen: set[str] = set()
        while (entry := _next_entry(stream)) is not None:
            if entry.name in seen:
                raise BadInputError(f"{path}: {entry.name} is in it twice; refused")
            seen.add(entry.name)
            if len(seen) > MAX_FILES:
                raise BadInputError(f"{path} has more than {MAX_FILES} files; refused")
            archived = ArchivedFile(stream, entry.name, entry.num_bytes)
            if entry.type != b"5":
                yield archived
            archived.skip(archived.left)
            stream.take(-entry.num_bytes % _BLOCK)
        stream.finish()


class _Stream:
    """The bytes of the tar, inflated as they are asked for."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where = where
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._reader = decompressor.stream_reader(file, read_across_frames=True, closefd=False)
        self._taken = 0
        self._most = FREE_BYTES + MAX_GROWTH * os.fstat(file.fileno()).st_size

    def take(self, num_bytes: int) -> bytes:
        """Returns exactly so many bytes."""
        data = self._read(num_bytes)
        if len(data) < num_bytes:
            raise BadInputError(f"{self.where} is cut short; fetch the archive again")
        return data

    def finish(self) -> None:
        """Reads the rest, which must be padding."""
        while data := self._read(_STEP):
            if data.strip(b"\0"):
                raise BadInputError(f"{self.where} goes on after its end; refused")

    def _read(self, num_bytes: int) -> bytes:
        try:
            data = self._reader.read(num_bytes) if num_bytes else b""
        except zstandard.ZstdError as error:
            raise BadInputError(
                f"{self.where} is no zstd archive, a damaged one, or needs a window beyond "
                f"{MAX_WINDOW_BYTES >> 20} MiB ({error}); fetch it again, or unpack it"
            ) from None
        self._taken += len(data)
        if self._taken > self._most:
            raise BadInputError(
                f"{self.where} grows to more than {MAX_GROWTH} times its bytes, which weights do "
                "not; refused"
            )
        return data


def _next_entry(stream: _Stream) -> _Entry | None:
    """Returns the next file or folder, or None at the archive's end."""
    long_name, long_size = None, None
    while True:
        header = stream.take(_BLOCK)
        if not header.strip(b"\0"):
            return None
        entry = _parse(header, stream.where)
        if entry.type in (b"L", b"x", b"g"):
            if entry.num_bytes > _MAX_NAME_BYTES:
                raise BadInputError(
                    f"{stream.where} has a header of {entry.num_bytes} bytes; the most that a name "
                    f"needs is {_MAX_NAME_BYTES}; refused"
                )
            data = stream.take(entry.num_bytes)
            stream.take(-entry.num_bytes % _BLOCK)
            if entry.type == b"L":
                long_name = data.rstrip(b"\0").decode("utf-8", "replace")
            elif entry.type == b"x":
                records = _pax_records(data, stream.where)
                long_name = records.get("path", long_name)
                long_size = records.get("size", long_size)
            continue
        num_bytes = entry.num_bytes if long_size is None else _number(long_size, stream.where)
        return _check(_Entry(long_name or entry.name, entry.type, num_bytes), stream.where)


def _parse(header: bytes, where: str) -> _Entry:
    stated = header[148:156].strip(b" \0")
    actual = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if not re.fullmatch(rb"[0-7]{1,7}", stated) or int(stated, 8) != actual:
        raise BadInputError(f"{where} holds no tar, or a damaged one; fetch the archive again")
    name, prefix = (header[part].split(b"\0")[0] for part in (slice(0, 100), slice(345, 500)))
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    size = header[124:136]
    if size[0] & 0x80:
        num_bytes = int.from_bytes(size, "big") - (0x80 << 88)
    else:
        digits = size.strip(b" \0")
        if not re.fullmatch(rb"[0-7]{0,12}", digits):
            raise BadInputError(f"{where} holds a damaged tar; fetch the archive again")
        num_bytes = int(digits or b"0", 8)
    kind = b"0" if header[156:157] == b"\0" else header[156:157]
    return _Entry(name.decode("utf-8", "replace"), kind, num_bytes)


def _check(entry: _Entry, where: str) -> _Entry:
    """Returns the entry under its plain name."""
    path = PurePosixPath(entry.name)
    if entry.type not in (b"0", b"5"):
        kind = _REFUSED_TYPES.get(entry.type, f"of tar's type {entry.type!r}")
        raise BadInputError(f"{where}: {entry.name} is {kind}; only plain files are read: refused")
    hidden = "\\" in entry.name or not entry.name.isprintable()
    if path.is_absolute() or ".." in path.parts or hidden:
        raise BadInputError(f"{where}: the name {entry.name!r} leads out of the archive; refused")
    limit = MAX_FILE_BYTES if entry.type == b"0" else 0
    if not 0 <= entry.num_bytes <= limit:
        raise BadInputError(
            f"{where}: {entry.name} claims {entry.num_bytes} bytes; at most {limit} are read: "
            "refused"
        )
    return _Entry(str(path), entry.type, entry.num_bytes)


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        match = _PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise BadInputError(f"{where} holds a damaged tar; fetch the archive again")
        key = match[2].decode("utf-8", "replace")
        if key.startswith("GNU.sparse"):
            raise BadInputError(f"{where} has sparse files; only plain ones are read: refused")
        records[key] = data[match.end() : end - 1].decode("utf-8", "replace")
        at = end
    return records


def _number(text: str, where: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise BadInputError(f"{where} holds a damaged tar; fetch the archive again")
    return int(text)
