"""Safetensors files: read and written tensor by tensor.

A file is the header's length (8 bytes, little-endian), the header (a JSON object: name -> dtype,
shape and the range of bytes), and the tensors' bytes, which cover the rest without hole or overlap.
What is read comes from strangers: every length is checked before anything is allocated by it.

Source: huggingface/safetensors, README.md, "Format".
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.formats.content import Content, FileContent, MemoryContent
from meshlm.formats.tensor import TensorInfo, row_blocks

# The format allows 100 MB. GPT-J 6B needs 40 kB; a hostile one takes 40 times its bytes to parse.
MAX_HEADER_BYTES = 4 << 20
MAX_NAME_CHARACTERS = 512
_MAX_DIMS = 16
_MAX_TENSOR_BYTES = 1 << 48
_LENGTH_BYTES = 8
_METADATA = "__metadata__"

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Tensors:
    """The tensors of one file. Each is read on request and not kept.

    Attributes:
        infos: shape and dtype by name, in the order of their bytes.
        metadata: the texts in the file's `__metadata__`.
    """

    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def __init__(self, content: Content, where: str) -> None:
        """Args: content: the whole file. where: its name, for messages.

        Raises:
            BadInputError: this is not a safetensors file, or its header contradicts its bytes.
        """
        header, start = _parse_header(content, where)
        self.metadata = _check_metadata(header.pop(_METADATA, {}), where)
        ranges = {name: _check_entry(name, entry, where) for name, entry in header.items()}
        ordered = sorted(ranges.items(), key=lambda item: item[1][1:])
        _check_cover(ordered, content.num_bytes - start, where)
        self.infos = {name: info for name, (info, _, _) in ordered}
        self._content = content
        self._ranges = {name: (start + a, start + b) for name, (_, a, b) in ordered}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, read-only.

        Raises:
            BadInputError: the file was cut since it was opened.
            MeshLMError: it cannot be read now.
        """
        info, data = self.infos[name], self._content.read(*self._ranges[name])
        if data.ctypes.data % info.dtype.itemsize:
            data = data.copy()
        return data.view(info.dtype).reshape(info.shape)


def open_tensors(path: Path) -> Tensors:
    """Returns the tensors of a file, which stays open.

    Raises:
        UsageError: there is no such file.
        BadInputError: it is no safetensors file, or its header lies.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise BadInputError(f"{path}: not a file")
    try:
        content = FileContent(path)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror})") from None
    return Tensors(content, str(path))


def from_bytes(data: bytes, where: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors, read-only views of `data`, and the metadata.

    Raises:
        BadInputError: this is no safetensors file, or its header lies; `where` is its name.
    """
    tensors = Tensors(MemoryContent(data), where)
    return {name: tensors.read(name) for name in tensors.infos}, dict(tensors.metadata)


def to_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the file that holds these arrays."""
    infos = {name: TensorInfo(shape=a.shape, dtype=a.dtype) for name, a in arrays.items()}
    header, offsets = _make_header(infos, metadata)
    parts = [header]
    for name in offsets:
        parts.extend(block.tobytes() for block in _blocks(arrays[name]))
    return b"".join(parts)


class TensorWriter:
    """A safetensors file being written, one tensor at a time and in any order.

    The file is open only while something is written to it: one that is given up needs no closing.
    """

    def __init__(
        self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        """Makes the file, which must be new, and writes its header."""
        self._path, self._infos = path, dict(infos)
        header, offsets = _make_header(infos, metadata)
        self._offsets = {name: len(header) + offset for name, offset in offsets.items()}
        self._missing = set(infos)
        with files.create(path) as file:
            file.write(header)

    @property
    def is_whole(self) -> bool:
        """Whether every tensor was written."""
        return not self._missing

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor where the header says that it is."""
        assert array.shape == self._infos[name].shape, name
        self.write_rows(name, [array])

    def write_rows(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """Writes a tensor from parts that make it up along its first dim, one after the other."""
        info, num_bytes = self._infos[name], 0
        self._missing.remove(name)
        with files.update(self._path) as file:
            file.seek(self._offsets[name])
            for part in parts:
                assert part.dtype == info.dtype, name
                num_bytes += part.nbytes
                for block in _blocks(part):
                    file.write(block)
        assert num_bytes == math.prod(info.shape) * info.dtype.itemsize, name

    def finish(self) -> None:
        """Returns when the whole file is on the disk."""
        assert self.is_whole, sorted(self._missing)
        with files.update(self._path) as file:
            os.fsync(file.fileno())


def _make_header(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    # The widest first, so that each lies at a multiple of its own width: torch wants that.
    ordered = sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, info in ordered:
        start, end = end, end + math.prod(info.shape) * info.dtype.itemsize
        code = _CODES[info.dtype]
        header[name] = {"dtype": code, "shape": list(info.shape), "data_offsets": [start, end]}
        offsets[name] = start
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    assert len(text) <= MAX_HEADER_BYTES
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, offsets


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the array's bytes, uint8: as one view where it is contiguous, else rows copied."""
    if array.flags.c_contiguous or array.ndim == 0:
        yield array.reshape(-1).view(np.uint8)
        return
    for rows in row_blocks(array.shape):
        yield np.ascontiguousarray(array[rows]).reshape(-1).view(np.uint8)


def _parse_header(content: Content, where: str) -> tuple[dict[str, Any], int]:
    if content.num_bytes < _LENGTH_BYTES:
        raise _too_short(where)
    length = int.from_bytes(content.read(0, _LENGTH_BYTES).tobytes(), "little")
    end = _LENGTH_BYTES + length
    if end > content.num_bytes or length > MAX_HEADER_BYTES:
        raise _bad(
            where,
            f"its header would be {length} bytes, of {content.num_bytes} in the file and at most "
            f"{MAX_HEADER_BYTES}",
        )
    text = content.read(_LENGTH_BYTES, end).tobytes()
    if not text.startswith(b"{"):
        raise _bad(where, "its header is not a JSON object")
    try:
        return strict_json.parse_object(text, where), end
    except strict_json.JsonError as error:
        raise _bad(where, f"its header {error.why}") from None


def _check_metadata(metadata: Any, where: str) -> dict[str, str]:
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text:
        raise _bad(where, f"its {_METADATA} is not text by name")
    return metadata


def _check_entry(name: str, entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    """Returns a tensor's shape and dtype, and where its bytes begin and end."""
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise _bad(where, f"{name[:60]!r} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(where, f"{name}: not just dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        # Of 8 bits and less, or complex: the file may be good.
        raise BadInputError(
            f"{where}: {name} is {str(code)[:20]!r}, a type that is not known here: get the model "
            "in float32, bfloat16 or float16"
        )
    if not _is_naturals(shape) or len(shape) > _MAX_DIMS:
        raise _bad(where, f"{name}: its shape is not a list of at most {_MAX_DIMS} whole numbers")
    # Beside the product, zeros left out: numpy counts in 64 bits even where a dim is zero.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MAX_TENSOR_BYTES:
        raise _bad(where, f"{name}: its shape is too large")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise _bad(where, f"{name}: its data_offsets are not two whole numbers")
    start, end = offsets
    wanted = math.prod(shape) * dtype.itemsize
    if end - start != wanted:
        raise _bad(where, f"{name}: {end - start} bytes for {wanted} of {code} {shape}")
    return TensorInfo(shape=tuple(shape), dtype=dtype), start, end


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_cover(
    ordered: list[tuple[str, tuple[TensorInfo, int, int]]], size: int, where: str
) -> None:
    """Raises where the tensors leave bytes out, share some, or end elsewhere than the file."""
    reached = 0
    for name, (_, start, end) in ordered:
        if start != reached:
            what = "bytes that no tensor has lie before it" if start > reached else "overlaps"
            raise _bad(where, f"{name}: {what} (at byte {start}, not {reached})")
        reached = end
    if reached != size:
        what = "is cut short" if reached > size else "goes on after its last tensor"
        raise _bad(where, f"it {what}: {size} bytes of tensors, not {reached}")


def _too_short(where: str) -> BadInputError:
    return _bad(where, f"shorter than {_LENGTH_BYTES} bytes")


def _bad(where: str, why: str) -> BadInputError:
    return BadInputError(f"{where}: not a usable safetensors file: {why}; get the file again")
