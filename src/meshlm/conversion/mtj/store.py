"""The arrays of all shards of one of the original's checkpoints, unpacked: checked, and joined."""

import abc
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meshlm.conversion.mtj.leaves import FILES_PER_SHARD, Leaf, Leaves, files_of
from meshlm.core.errors import BadInputError
from meshlm.formats import archive
from meshlm.formats.npy import NpyHeader, copy
from meshlm.formats.npz import NpzFile

# Files are kept open, each with a descriptor, of which a process may have 1,024 or so.
_MOST_OPEN = 128
_COUNTER_DTYPES = ("int32", "uint32", "int64")
_WEIGHT_DTYPES = ("float32", "float16", "bfloat16")


class Reader(abc.ABC):
    """Tensors that may be read."""

    @abc.abstractmethod
    def joined(self, leaf: Leaf) -> np.ndarray:
        """Returns the arrays of all shards in one, the store of the leaf's layout."""

    @abc.abstractmethod
    def raw(self, leaf: Leaf, shard: int) -> np.ndarray:
        """Returns one shard's leaf."""

    @abc.abstractmethod
    def release(self) -> None:
        """Lets go of what it holds for one part; nothing of it is read after this."""


class Store(Reader):
    """What the shards hold: headers at once, counts and vectors at any time, matrices by parts."""

    shards: int
    headers: Sequence[Sequence[NpyHeader]]
    """Of every leaf, by shard."""
    names: Sequence[Sequence[str]]
    """What to call the place of every leaf, by shard."""

    def empty(self, leaf: Leaf) -> np.ndarray:
        """Returns the store of a leaf, to be filled."""
        shape = leaf.layout.store_shape(leaf.shape, self.shards)
        return np.empty(shape, self.headers[0][leaf.number].dtype)

    @abc.abstractmethod
    def counter(self, number: int) -> np.ndarray:
        """Returns a count of every shard, [S]."""

    @abc.abstractmethod
    def prepare(self, parts: Sequence[Sequence[Leaf]]) -> Reader:
        """Returns what reads the first of the parts; after it the others are going to be read."""


class FolderStore(Store):
    """Shards in a step's folder, read array by array."""

    def __init__(self, step_folder: Path) -> None:
        """Reads the headers of every array, and no array.

        Raises:
            BadInputError: shards or files are missing, too many or damaged.
        """
        self.shards = count_shards([path.name for path in step_folder.iterdir()], str(step_folder))
        self._open_files: OrderedDict[Path, NpzFile] = OrderedDict()
        self._places: list[list[tuple[Path, int]]] = []
        headers: list[list[NpyHeader]] = []
        for shard in range(self.shards):
            folder = step_folder / f"shard_{shard}"
            if not folder.is_dir():
                raise BadInputError(f"{folder} is not a folder: fetch the checkpoint again")
            check_files([path.name for path in folder.iterdir()], str(folder))
            files = [folder / f"{file}.npz" for file in range(FILES_PER_SHARD)]
            of_files = {path: self._file(path).headers for path in files}
            headers.append([header for of_file in of_files.values() for header in of_file])
            check_split([len(of_file) for of_file in of_files.values()], str(folder))
            self._places.append([(p, i) for p, of in of_files.items() for i in range(len(of))])
        self.headers = headers
        _refuse_bomb(step_folder, [path for path, _ in itertools.chain(*self._places)], headers)
        self.names = [[f"{path} arr_{i}" for path, i in places] for places in self._places]

    def counter(self, number: int) -> np.ndarray:
        return np.stack([self._read(shard, number) for shard in range(self.shards)])

    def joined(self, leaf: Leaf) -> np.ndarray:
        result = self.empty(leaf)
        for shard, target in enumerate(leaf.layout.arrays(result, self.shards)):
            copy(target, self._read(shard, leaf.number))
        return result

    def raw(self, leaf: Leaf, shard: int) -> np.ndarray:
        return self._read(shard, leaf.number)

    def prepare(self, parts: Sequence[Sequence[Leaf]]) -> Reader:
        return self

    def release(self) -> None:
        """Does nothing: nothing of what was read is kept."""

    def _read(self, shard: int, number: int) -> np.ndarray:
        path, place = self._places[shard][number]
        return self._file(path).read(place)

    def _file(self, path: Path) -> NpzFile:
        file = self._open_files.pop(path, None) or NpzFile.open(path)
        self._open_files[path] = file
        while len(self._open_files) > _MOST_OPEN:
            self._open_files.popitem(last=False)
        return file


def _refuse_bomb(
    step_folder: Path, paths: Sequence[Path], headers: Sequence[Sequence[NpyHeader]]
) -> None:
    """Deflated arrays may be small in their files and have any size in memory."""
    there = sum(path.stat().st_size for path in set(paths))
    promised = sum(header.data_bytes for of_shard in headers for header in of_shard)
    if promised > archive.FREE_BYTES + archive.MAX_GROWTH * there:
        raise BadInputError(
            f"{step_folder}: files of {there:,} bytes would grow to {promised:,}, more than "
            f"{archive.MAX_GROWTH} times as many, which weights do not: refused"
        )


def count_shards(names: Sequence[str], where: str) -> int:
    """Returns how many shards there are, of the names in a step's folder.

    Raises:
        BadInputError: some are missing, or something else is there that looks like one.
    """
    found = {name for name in names if name.startswith("shard_")}
    wanted = [f"shard_{shard}" for shard in range(len(found))]
    for name in sorted(found - set(wanted)):
        missing = next(name for name in wanted if name not in found)
        raise BadInputError(
            f"{where} has {len(found)} shards, {name} among them, but no {missing}: fetch what is "
            "missing, or remove what does not belong there"
        )
    if not found:
        raise BadInputError(f"{where} has no folder shard_0: it is not a step of the original's")
    return len(found)


def check_files(names: Sequence[str], where: str) -> None:
    """Raises BadInputError where a shard has not exactly the files 0.npz to 15.npz."""
    found = {name for name in names if name.endswith(".npz")}
    wanted = {f"{file}.npz" for file in range(FILES_PER_SHARD)}
    for name in sorted(wanted - found):
        raise BadInputError(f"{where} has no {name}: fetch the checkpoint again")
    for name in sorted(found - wanted):
        raise BadInputError(
            f"{where} has {name}, which no checkpoint of the original's has: refused"
        )


def check_split(sizes: Sequence[int], where: str) -> None:
    """Raises BadInputError where the arrays are not spread over the files as the original does."""
    places = files_of(sum(sizes))
    for file, size in enumerate(sizes):
        wanted = sum(place[0] == file for place in places)
        if size != wanted:
            raise BadInputError(
                f"{where}/{file}.npz has {size} arrays; of the {sum(sizes)} in this shard it "
                f"should have {wanted}: fetch the checkpoint again"
            )


def check_headers(store: Store, leaves: Leaves) -> None:
    """Raises BadInputError where an array has not the shape that its leaf needs, or its dtype."""
    for shard, headers in enumerate(store.headers):
        if len(headers) != len(leaves):
            raise BadInputError(
                f"shard_{shard} has {len(headers)} arrays and shard_0 has {len(leaves)}: "
                "fetch the checkpoint again"
            )
    for leaf in leaves.tensors:
        wanted = leaf.layout.array_shape(leaf.shape, store.shards)
        _check_leaf(store, leaf.number, leaf.path, wanted, _WEIGHT_DTYPES)
    for name, number in leaves.counters.items():
        _check_leaf(store, number, name, (), _COUNTER_DTYPES)


def _check_leaf(
    store: Store, number: int, path: str, shape: tuple[int, ...], dtypes: Sequence[str]
) -> None:
    first = store.headers[0][number].dtype
    for shard, headers in enumerate(store.headers):
        header, where = headers[number], f"{store.names[shard][number]} (shard_{shard}/{path})"
        if header.shape != shape:
            raise BadInputError(
                f"{where} is {list(header.shape)} and should be {list(shape)} by the config: give "
                "the fitting --config"
            )
        if header.dtype.name not in dtypes:
            raise BadInputError(f"{where} is {header.dtype.name}, not one of {', '.join(dtypes)}")
        if header.dtype != first:
            raise BadInputError(
                f"{where} is {header.dtype.name} and {first.name} in shard_0: fetch it again"
            )
