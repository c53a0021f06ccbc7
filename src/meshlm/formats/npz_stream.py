"""The arrays of an npz inside an archive, in the order of the file, without its directory.

An npz is a zip file, whose directory is at its end. In a stream the directory comes too late, so
members are found by their local headers. Those of a file that was written to a stream, as
Mesh-Transformer-JAX wrote to buckets, lack the sizes; the array's own header has them.
"""

import struct
import zipfile
from collections.abc import Iterator

import numpy as np

from meshlm.core.errors import BadInputError
from meshlm.formats.archive import ArchivedFile
from meshlm.formats.npy import Body, read_header, read_into
from meshlm.formats.npz import DeflatedBody

_LOCAL, _DIRECTORY, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_END = struct.Struct("<4s4H2IH")
_SIZES_FOLLOW, _UNICODE = 8, 0x800
_MAX_NAME_BYTES, _MAX_EXTRA_BYTES = 64, 1024
_MAX_DIRECTORY_BYTES = 4 << 20
_STEP_BYTES = 1 << 20
_ZIP64 = 0xFFFFFFFF


class StreamedArray:
    """One array of a stream. It can be read until the next one is requested."""

    def __init__(self, file: ArchivedFile, where: str) -> None:
        """Reads the headers of the member, after its signature, and of the array."""
        _, flags, method, _, _, crc, deflated_bytes, num_bytes, name_bytes, extra_bytes = (
            struct.unpack("<5H3I2H", file.take(26))
        )
        if name_bytes > _MAX_NAME_BYTES or extra_bytes > _MAX_EXTRA_BYTES:
            raise BadInputError(f"{where} is damaged, or not of numpy's making: refused")
        name = file.take(name_bytes).decode("latin-1")
        extra = file.take(extra_bytes)
        self.name, self.where = name, f"{where} {name}"
        if flags & ~(_SIZES_FOLLOW | _UNICODE) or method not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise BadInputError(
                f"{self.where} is encrypted or compressed by method {method}; known: stored, "
                "deflated"
            )
        self._file, self._crc, self._sizes_follow = file, crc, bool(flags & _SIZES_FOLLOW)
        self._zip64 = extra[:2] == b"\x01\x00"
        if self._zip64 and len(extra) >= 20 and num_bytes == _ZIP64:
            num_bytes, deflated_bytes = struct.unpack("<2Q", extra[4:20])
        self._deflated = method == zipfile.ZIP_DEFLATED
        known = None if self._sizes_follow else deflated_bytes
        self._body = self._make_body(known)
        self.header = read_header(self._body, self.where)
        wanted = self.header.num_bytes + self.header.data_bytes
        if known is not None and (num_bytes != wanted or not (self._deflated or known == wanted)):
            raise BadInputError(
                f"{self.where} should have {wanted} bytes by its shape and has {num_bytes}: refused"
            )
        self._was_read = False

    def read_into(self, target: np.ndarray) -> None:
        """Reads the array into any view of its shape."""
        read_into(self._body, self.header, target)
        self._was_read = True

    def finish(self) -> None:
        """Reads to the end of the member and checks it.

        Raises:
            BadInputError: it does not end where it should, or is not as it was written.
        """
        left = 0 if self._was_read else self.header.data_bytes
        while left:
            left -= len(self._body.take(min(left, _STEP_BYTES)))
        if isinstance(self._body, DeflatedBody):
            self._file.give_back(self._body.finish())
        crc = self._crc
        if self._sizes_follow:
            if self._file.take(4) != _DESCRIPTOR:
                raise BadInputError(f"{self.where} does not end where its array does: refused")
            (crc,) = struct.unpack("<I", self._file.take(4))
            self._file.skip(16 if self._zip64 else 8)
        if self._was_read and self._body.crc != crc:
            raise BadInputError(
                f"{self.where} is damaged: its checksum is wrong; fetch the archive again"
            )

    def _make_body(self, num_bytes: int | None) -> Body:
        if not self._deflated:
            return _Stored(self._file)
        most = self._file.left if num_bytes is None else min(num_bytes, self._file.left)
        return DeflatedBody(self._file, most, self.where)


class _Stored(Body):
    """The bytes of a stored member."""

    def __init__(self, file: ArchivedFile) -> None:
        self._file = file

    def take(self, num_bytes: int) -> bytes:
        return self._file.take(num_bytes)


def streamed_arrays(file: ArchivedFile, where: str) -> Iterator[tuple[int, StreamedArray]]:
    """Yields (place, array) in the order of the file; each may be read until the next is asked for.

    Raises:
        BadInputError: the file is not a whole npz of plain arrays, as `np.savez` writes it.
    """
    count = 0
    while (signature := file.take(4)) == _LOCAL:
        array = StreamedArray(file, where)
        if array.name != f"arr_{count}.npy":
            raise BadInputError(f"{array.where} comes where arr_{count}.npy should: refused")
        yield count, array
        array.finish()
        count += 1
    if signature != _DIRECTORY or not _END.size <= file.left <= _MAX_DIRECTORY_BYTES:
        raise BadInputError(f"{where} is not a whole npz file: fetch the archive again")
    end = _END.unpack(file.take(file.left)[-_END.size :])
    if end[0] != b"PK\x05\x06" or end[4] != count:
        raise BadInputError(f"{where} is not a whole npz file: fetch the archive again")
