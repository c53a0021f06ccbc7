"""Single arrays in numpy's format, as members of an npz: a strict header parser, then the bytes.

Only plain arrays of the dtypes that weights have are read. Nothing is unpickled, and nothing is
allocated before a header has been compared with the number of bytes that follow it.
"""

import abc
import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from meshlm.core.errors import BadInputError
from meshlm.formats.tensor import row_blocks

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# numpy has no bfloat16 and writes it as two bytes without a type.
_DTYPES = {
    "<f4": np.dtype("<f4"),
    "<f2": np.dtype("<f2"),
    "|V2": BFLOAT16,
    "<V2": BFLOAT16,
    "bfloat16": BFLOAT16,
    "<i4": np.dtype("<i4"),
    "<u4": np.dtype("<u4"),
    "<i8": np.dtype("<i8"),
}
_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 4096
_MAX_DIMS = 4
_HEADER = re.compile(
    r"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,15}, )*\d{1,15},?|)\), \}\s*\n"
)


@dataclass(frozen=True, kw_only=True)
class NpyHeader:
    """Header of one array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    """The first dim varies fastest."""
    num_bytes: int
    """Length of the header itself."""

    @property
    def data_bytes(self) -> int:
        """Returns the length of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Body(abc.ABC):
    """The bytes of one member of an npz, read from front to back."""

    crc = 0

    @abc.abstractmethod
    def take(self, num_bytes: int) -> bytes | memoryview:
        """Returns exactly the next `num_bytes`; raises BadInputError if there are fewer."""

    def read(self, num_bytes: int) -> bytes | memoryview:
        """Returns the next `num_bytes` and adds them to the checksum in `crc`."""
        data = self.take(num_bytes)
        self.crc = zlib.crc32(data, self.crc)
        return data


def read_header(body: Body, where: str) -> NpyHeader:
    """Returns the header of an array; reads the header only.

    Raises:
        BadInputError: there is no header, or its array is not of plain numbers of a known dtype.
    """
    start = bytes(body.read(10))
    if start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise BadInputError(f"{where} is not a numpy array: it begins with {start[:8]!r}")
    if start[6] == 1:
        lead, length = 10, struct.unpack("<H", start[8:])[0]
    else:
        lead, length = 12, struct.unpack("<I", start[8:] + bytes(body.read(2)))[0]
    if length > _MAX_HEADER_BYTES:
        raise BadInputError(
            f"{where} has a header of {length} bytes; the most that an array of weights needs is "
            f"{_MAX_HEADER_BYTES}"
        )
    return _parse(bytes(body.read(length)), lead + length, where)


def _parse(header: bytes, num_bytes: int, where: str) -> NpyHeader:
    text = header.decode("latin-1")
    if re.match(r"\{'descr': '[|<>=]?O", text):
        raise BadInputError(
            f"{where} is an array of pickled objects, which could run code when loaded: refused"
        )
    match = _HEADER.fullmatch(text)
    if match is None:
        raise BadInputError(f"{where} has a header that is not of a plain array: {text[:60]!r}")
    descr, fortran, dims = match.groups()
    if descr not in _DTYPES:
        raise BadInputError(f"{where} is of dtype {descr!r}; known: {', '.join(_DTYPES)}")
    shape = tuple(int(dim) for dim in dims.replace(" ", "").split(",") if dim)
    if len(shape) > _MAX_DIMS:
        raise BadInputError(f"{where} has {len(shape)} dims; weights have at most {_MAX_DIMS}")
    return NpyHeader(
        dtype=_DTYPES[descr], shape=shape, fortran=fortran == "True", num_bytes=num_bytes
    )


def read_into(body: Body, header: NpyHeader, target: np.ndarray) -> None:
    """Reads an array's bytes, block by block, into `target`: any view of the header's shape."""
    shape = header.shape
    if header.fortran:
        shape, target = shape[::-1], target.T
    for rows in row_blocks(shape):
        block = target[rows]
        data = np.frombuffer(body.read(block.size * header.dtype.itemsize), header.dtype)
        copy(block, data.reshape(block.shape))


def header_bytes(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Returns the header that numpy writes for an array of this shape and dtype."""
    descr = "<V2" if dtype == BFLOAT16 else dtype.str
    buffer = io.BytesIO()
    content = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, content)
    return buffer.getvalue()


def write_array(write: Callable[[bytes], object], array: np.ndarray) -> None:
    """Writes header and bytes of an array, any view, block by block."""
    write(header_bytes(array.shape, array.dtype))
    for rows in row_blocks(array.shape):
        write(array[rows].tobytes())


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array; matrices in tiles, so that a transposed copy stays in the cache."""
    if target.ndim < 2:
        target[...] = source
        return
    for rows, columns in _tiles(target.shape):
        target[rows, columns] = source[rows, columns]


_TILE = 256


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    for row in range(0, shape[0], _TILE):
        for column in range(0, shape[1], _TILE):
            yield slice(row, row + _TILE), slice(column, column + _TILE)
