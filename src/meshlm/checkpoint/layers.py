"""One layer at a time: reading a checkpoint, and writing one that is larger than memory.

Orbax saves and restores whole arrays. What it saved is zarr in an OCDBT store, which tensorstore
reads and writes in parts. To write, Orbax is given arrays of one element, so that everything but
the numbers is its own; then each is replaced by the array of the full shape, a layer at a time.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from meshlm.checkpoint.folder import ARRAYS_NAME, MANIFEST_NAME, reading
from meshlm.checkpoint.manifest import (
    ArrayInfo,
    FileInfo,
    Manifest,
    check_file_names,
    hash_bytes,
    read_manifest,
)
from meshlm.checkpoint.saving import MAX_CHUNK_BYTES, is_layer_stack, saving_context, seal
from meshlm.core.errors import BadInputError
from meshlm.core.files import sync_folder, write_new
from meshlm.formats.tensor import row_blocks

_STATE = "state"
_SMALL_BYTES = 64 * 1024
_SLACK = 1.01


class LayerReader:
    """Reads a step's arrays, whole or by layers; while it lives, retention leaves the step alone.

    Checksums are not looked at: see `verify`.

    Raises: UsageError where there is no checkpoint; BadInputError where its manifest is damaged or
    promises more bytes than its files have.
    """

    def __init__(self, step_folder: Path) -> None:
        self._folder = step_folder.absolute()
        self._manifest = read_manifest(self._folder)
        self._opened: dict[str, Any] = {}
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(reading(self._folder))
        self._refuse_promises()

    @property
    def manifest(self) -> Manifest:
        """The checkpoint's table of contents."""
        return self._manifest

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """Returns an array, or one layer of a stack; up to twice its bytes are held on the way.

        Raises: BadInputError where it is not as the manifest says.
        """
        try:
            stored = self._open(name)
            return _read(stored if layer is None else stored[layer])
        except (OSError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInputError(
                f"checkpoint {self._folder}: array {name} cannot be read: {reason}"
            ) from None

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            info = self._manifest.arrays[name]
            stored = ts.open(
                _spec(self._folder / ARRAYS_NAME, self._manifest.stored_name(name))
            ).result()
            found = ArrayInfo(shape=tuple(stored.shape), dtype=stored.dtype.name)
            if found != info:
                raise ValueError(f"it is {found}, and {info} in {MANIFEST_NAME}")
            chunk: Any = stored.chunk_layout.read_chunk.shape
            if info.shape and any(
                part > whole for part, whole in zip(chunk, info.shape, strict=True)
            ):
                raise ValueError(f"its chunks are {list(chunk)}, larger than itself")
            self._opened[name] = stored
        return self._opened[name]

    def _refuse_promises(self) -> None:
        """Chunks that are not there read as zeros: a few bytes could ask for any memory."""
        sizes = [_num_bytes(info) for info in self._manifest.arrays.values()]
        promised = sum(size for size in sizes if size > _SMALL_BYTES)
        paths = [self._folder / name for name in self._manifest.files]
        there = sum(path.stat().st_size for path in paths if path.is_file())
        if promised > there * _SLACK:
            raise BadInputError(
                f"checkpoint {self._folder}: its arrays have {promised:,} bytes and its files "
                f"{there:,}; use another checkpoint"
            )


class LayerWriter:
    """Writes a checkpoint into an empty folder, one layer or one whole array at a time.

    Layers are chunks of their own, as `Checkpointer` stores them; other arrays are cut into chunks
    of rows of at most 64 MB, so that no array is held twice.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, ArrayInfo],
        *,
        is_stacked: Callable[[str], bool] = is_layer_stack,
    ) -> None:
        self._folder, self._arrays, self._is_stacked = folder.absolute(), dict(arrays), is_stacked
        self._left = {
            (name, layer)
            for name, info in arrays.items()
            for layer in (range(info.shape[0]) if is_stacked(name) else (None,))
        }
        self._opened: dict[str, Any] = {}
        skeleton = {n: jnp.zeros((1,) * len(i.shape), i.dtype) for n, i in arrays.items()}
        with saving_context(is_stacked):
            ocp.save(str(self._folder / ARRAYS_NAME), skeleton)

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """Writes an array, or one layer of a stack, once; it is in its file when this returns."""
        info = self._arrays[name]
        wanted = info.shape if layer is None else info.shape[1:]
        assert array.shape == wanted, (name, array.shape, wanted)
        assert array.dtype.name == info.dtype, (name, array.dtype, info.dtype)
        self._left.remove((name, layer))
        stored = self._create(name, info)
        if layer is not None:
            stored[layer].write(array).result()
            return
        for rows in row_blocks(array.shape, _chunk_numbers(array.shape, self._chunk(name, info))):
            stored[rows].write(array[rows]).result()

    def seal(self, step: int, files: Mapping[str, bytes]) -> None:
        """Writes the small files, brings all to disk, and then the manifest: a whole checkpoint."""
        check_file_names(files)
        assert not self._left, f"never written: {sorted(map(str, self._left))[:3]}"
        self._opened.clear()
        seal(self._folder, step, self._arrays, files)

    def _create(self, name: str, info: ArrayInfo) -> Any:
        if name not in self._opened:
            grid = {"configuration": {"chunk_shape": self._chunk(name, info)}, "name": "regular"}
            metadata = {
                "shape": info.shape,
                "data_type": info.dtype,
                "chunk_grid": grid,
                "codecs": [_sharded_codec(self._chunk(name, info))],
                "fill_value": 0,
            }
            spec = _spec(self._folder / ARRAYS_NAME, name) | {
                "metadata": metadata,
                "create": True,
                "delete_existing": True,
                "store_data_equal_to_fill_value": True,
            }
            self._opened[name] = ts.open(spec).result()
        return self._opened[name]

    def _chunk(self, name: str, info: ArrayInfo) -> tuple[int, ...]:
        if not info.shape or self._is_stacked(name):
            return (1, *info.shape[1:]) if info.shape else ()
        row_bytes = _num_bytes(info) // info.shape[0]
        return (min(info.shape[0], max(1, MAX_CHUNK_BYTES // row_bytes)), *info.shape[1:])


def add_file(step_folder: Path, name: str, data: bytes) -> None:
    """Adds a small file to a sealed checkpoint that nobody reads yet, and to its manifest."""
    check_file_names([name])
    manifest = read_manifest(step_folder)
    info: FileInfo = hash_bytes(data)
    write_new(step_folder / name, data)
    files = {**manifest.files, name: info}
    whole = dataclasses.replace(manifest, files=files)
    (step_folder / MANIFEST_NAME).unlink()
    write_new(step_folder / MANIFEST_NAME, whole.to_json())
    sync_folder(step_folder)


def _spec(arrays: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{arrays / _STATE}/"}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
    }


def _sharded_codec(chunk: tuple[int, ...]) -> dict[str, Any]:
    """The codec that Orbax writes: one inner chunk, little-endian, not compressed."""
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    configuration = {
        "chunk_shape": chunk,
        "codecs": [plain],
        "index_codecs": [plain, {"name": "crc32c"}],
    }
    return {"name": "sharding_indexed", "configuration": configuration}


def _read(stored: Any) -> np.ndarray:
    chunk = stored.chunk_layout.read_chunk.shape
    if not stored.shape or chunk[0] >= stored.shape[0]:
        return stored.read().result()
    result = np.empty(stored.shape, stored.dtype.numpy_dtype)
    for rows in row_blocks(stored.shape, _chunk_numbers(stored.shape, chunk)):
        ts.array(result[rows]).write(stored[rows]).result()
    return result


def _chunk_numbers(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    """Returns the numbers of as many whole rows as a chunk has."""
    return math.prod((*chunk[:1], *shape[1:]))


def _num_bytes(info: ArrayInfo) -> int:
    return math.prod(info.shape) * jnp.dtype(info.dtype).itemsize
