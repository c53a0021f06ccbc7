"""Files of numpy arrays (`np.savez`), read strictly, one array at a time.

The members are `arr_0.npy`, `arr_1.npy` and so on, stored or deflated. Every size that the file
states is compared with the file's length. A deflated member is inflated to the length of its array
and no further, so no member can claim more memory than its array has.
"""

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshlm.core.errors import BadInputError
from meshlm.formats.content import Content, FileContent, MemoryContent
from meshlm.formats.npy import Body, NpyHeader, read_header, read_into

_LOCAL = struct.Struct("<4s5H3I2H")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SIZES_FOLLOW = 8
_SIZES_BYTES = (16, 24)
"""Length of the checksum and the sizes (4 or 8 bytes each) after a member written to a stream."""
_MAX_MEMBERS = 10_000
_MAX_DIRECTORY_BYTES = 4 << 20


class StoredBody(Body):
    """The bytes of a stored member."""

    def __init__(self, content: Content, start: int, stop: int, where: str) -> None:
        """Args: start, stop: where the bytes begin and end in the file."""
        self._content, self._at, self._stop, self._where = content, start, stop, where

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > self._stop - self._at:
            raise BadInputError(f"{self._where} is cut short: fetch the file again")
        self._at += num_bytes
        return self._content.read(self._at - num_bytes, self._at).data


class DeflatedBody(Body):
    """The bytes of a deflated member, inflated when they are taken."""

    _STEP = 1 << 16

    def __init__(self, source: Body, num_bytes: int, where: str) -> None:
        """Args: num_bytes: the most bytes of `source` that are deflated."""
        self._source, self._left, self._where = source, num_bytes, where
        self._inflate = zlib.decompressobj(-15)
        self._tail = b""

    def take(self, num_bytes: int) -> bytes:
        parts: list[bytes] = []
        missing = num_bytes
        while missing:
            part = self._next(missing)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def finish(self) -> bytes:
        """Returns the bytes taken from the source after the end of the deflated ones.

        Raises:
            BadInputError: they inflate to more than was read.
        """
        while not self._inflate.eof:
            if self._next(1, at_end=True):
                raise BadInputError(f"{self._where} inflates to more than its array has: refused")
        return self._inflate.unused_data

    def _next(self, most: int, at_end: bool = False) -> bytes:
        """Returns some bytes; with `at_end`, none if the deflated bytes end here."""
        while True:
            if self._inflate.eof:
                if at_end:
                    return b""
                raise BadInputError(f"{self._where} inflates to less than its array has: refused")
            data = self._tail or self._deflated()
            try:
                part = self._inflate.decompress(data, most)
            except zlib.error as error:
                raise BadInputError(
                    f"{self._where} is damaged ({error}): fetch the file again"
                ) from None
            self._tail = self._inflate.unconsumed_tail
            if part or (at_end and self._inflate.eof):
                return part

    def _deflated(self) -> bytes:
        step = min(self._STEP, self._left)
        if step == 0:
            raise BadInputError(f"{self._where} is cut short: fetch the file again")
        self._left -= step
        return bytes(self._source.take(step))


@dataclass(frozen=True, kw_only=True)
class _Member:
    start: int
    num_bytes: int
    """In the file, deflated or not."""
    deflated: bool
    crc: int
    header: NpyHeader


class NpzFile:
    """The arrays of one file, by number. Each is read on request and not kept."""

    def __init__(self, data: bytes | Content, where: str) -> None:
        """Reads the directory and all headers, no array.

        Raises:
            BadInputError: the file is not a whole npz of plain arrays.
        """
        self.where = where
        self._content = data if isinstance(data, Content) else MemoryContent(data)
        self._checked: set[int] = set()
        infos, end = _directory(self._content, where)
        _check_cover(self._content, infos, end, where)
        self._members = [self._member(info, number) for number, info in enumerate(infos)]

    @classmethod
    def open(cls, path: Path) -> "NpzFile":
        """Returns the file's arrays; it stays open."""
        return cls(_open(path), str(path))

    @property
    def headers(self) -> list[NpyHeader]:
        """Returns the header of every array in order."""
        return [member.header for member in self._members]

    def read(self, number: int) -> np.ndarray:
        """Returns an array; treat it as read-only.

        Raises:
            BadInputError: its bytes are not the ones that were written, or the file was cut since
                it was opened.
            MeshLMError: it cannot be read now.
        """
        member = self._members[number]
        if member.deflated:
            result = np.empty(member.header.shape, member.header.dtype)
            self.read_into(number, result)
            return result
        data = self._content.read(member.start, member.start + member.num_bytes)
        if number not in self._checked:
            self._check(number, zlib.crc32(data))
        order = "F" if member.header.fortran else "C"
        numbers = np.frombuffer(data[member.header.num_bytes :].data, member.header.dtype)
        return numbers.reshape(member.header.shape, order=order)

    def read_into(self, number: int, target: np.ndarray) -> None:
        """Reads an array into `target`, any view of its shape.

        Raises:
            BadInputError: as `read`.
        """
        member, where = self._members[number], self._name(number)
        body = self._body(member.start, member.num_bytes, member.deflated, where)
        read_header(body, where)
        read_into(body, member.header, target)
        if isinstance(body, DeflatedBody):
            body.finish()
        self._check(number, body.crc)

    def _check(self, number: int, crc: int) -> None:
        if crc != self._members[number].crc:
            raise BadInputError(
                f"{self._name(number)} is damaged: its checksum is wrong; fetch the file again"
            )
        self._checked.add(number)

    def _member(self, info: zipfile.ZipInfo, number: int) -> _Member:
        where = self._name(number)
        start, num_bytes = _start(self._content, info, self.where), info.compress_size
        if num_bytes > self._content.num_bytes - start:
            raise BadInputError(f"{where} reaches beyond the end of its file: fetch it again")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        header = read_header(self._body(start, num_bytes, deflated, where), where)
        wanted = header.num_bytes + header.data_bytes
        if info.file_size != wanted or not (deflated or num_bytes == wanted):
            raise BadInputError(
                f"{where} should have {wanted} bytes by its shape and has {info.file_size}: refused"
            )
        return _Member(
            start=start, num_bytes=num_bytes, deflated=deflated, crc=info.CRC, header=header
        )

    def _body(self, start: int, num_bytes: int, deflated: bool, where: str) -> Body:
        body = StoredBody(self._content, start, start + num_bytes, where)
        return DeflatedBody(body, num_bytes, where) if deflated else body

    def _name(self, number: int) -> str:
        return f"{self.where} arr_{number}"


def _open(path: Path) -> FileContent:
    if not path.is_file():
        raise BadInputError(f"{path} is not a file: fetch the checkpoint again")
    content = FileContent(path)
    if not content.num_bytes:
        raise BadInputError(f"{path} is empty: fetch it again")
    return content


def _directory(content: Content, where: str) -> tuple[list[zipfile.ZipInfo], int]:
    """Returns the entries of `arr_0.npy`, `arr_1.npy`, ... in this order, and where they begin."""
    try:
        with zipfile.ZipFile(_Buffer(content)) as file:  # pyright: ignore[reportArgumentType]
            infos, start = file.infolist(), file.start_dir
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise BadInputError(f"{where} is not a whole npz file ({error}): fetch it again") from None
    if len(infos) > _MAX_MEMBERS:
        raise BadInputError(f"{where} has {len(infos)} members; at most {_MAX_MEMBERS} are read")
    by_name = {info.filename: info for info in infos}
    names = [f"arr_{number}.npy" for number in range(len(infos))]
    if sorted(by_name) != sorted(names):
        odd = sorted({*by_name} - {*names}) or ["a name twice"]
        raise BadInputError(
            f"{where} should hold arr_0.npy to arr_{len(infos) - 1}.npy and has {odd[0]!r}: refused"
        )
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in _METHODS:
            raise BadInputError(
                f"{where} {info.filename} is encrypted or compressed by method "
                f"{info.compress_type}; known: stored, deflated"
            )
    return [by_name[name] for name in names], start


def _check_cover(content: Content, infos: list[zipfile.ZipInfo], end: int, where: str) -> None:
    """Raises BadInputError unless the members fill the file up to `end`, one behind the other."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    starts = [*(info.header_offset for info in ordered), end]
    if starts[0]:
        raise BadInputError(f"{where} does not begin with its first array: refused")
    for info, after in zip(ordered, starts[1:], strict=True):
        gap = after - _start(content, info, where) - info.compress_size
        if gap < 0:
            raise BadInputError(f"{where} is a zip whose members overlap: refused")
        if gap not in (_SIZES_BYTES if info.flag_bits & _SIZES_FOLLOW else (0,)):
            raise BadInputError(f"{where} has bytes between its members: refused")


def _start(content: Content, info: zipfile.ZipInfo, where: str) -> int:
    """Returns where a member's bytes begin, having compared its own header with the directory."""
    offset = info.header_offset
    if not 0 <= offset <= content.num_bytes - _LOCAL.size:
        raise BadInputError(f"{where} {info.filename} lies outside of its file: refused")
    name_start = offset + _LOCAL.size
    fields = _LOCAL.unpack(content.read(offset, name_start))
    name_end = min(name_start + fields[9], content.num_bytes)
    name = content.read(name_start, name_end).tobytes()
    same = name == info.filename.encode() and fields[3] == info.compress_type
    if fields[0] != b"PK\x03\x04" or not same:
        raise BadInputError(f"{where} {info.filename} is not where the directory says: refused")
    return name_start + fields[9] + fields[10]


class _Buffer:
    """Content with the methods of a file that `zipfile` needs."""

    def __init__(self, content: Content) -> None:
        self._content, self._at = content, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._content.num_bytes)[whence]
        if at < 0:
            raise OSError("it is too short")
        self._at = at
        return at

    def read(self, num_bytes: int = -1) -> bytes:
        size = self._content.num_bytes
        end = size if num_bytes < 0 else min(self._at + num_bytes, size)
        if end - self._at > _MAX_DIRECTORY_BYTES:
            raise OSError(f"its directory is larger than {_MAX_DIRECTORY_BYTES} bytes")
        result = self._content.read(self._at, max(self._at, end)).tobytes()
        self._at += len(result)
        return result
