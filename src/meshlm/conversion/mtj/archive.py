"""A published archive of the original's checkpoint, read in passes over its stream.

The first pass reads the headers of all arrays, the vectors and the counts. The matrices of some
parts are then read in a pass over the whole stream, joined as they come by: only what the next
parts need is ever in memory, and nothing is written to disk.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from meshlm.conversion.mtj import finding as mtj_finding
from meshlm.conversion.mtj.config import MAX_CONFIG_BYTES
from meshlm.conversion.mtj.leaves import FILES_PER_SHARD, Leaf, files_of
from meshlm.conversion.mtj.store import Reader, Store, check_files, check_split, count_shards
from meshlm.core.errors import BadInputError
from meshlm.formats.archive import FREE_BYTES, MAX_GROWTH, ArchivedFile, archived_files
from meshlm.formats.npy import NpyHeader
from meshlm.formats.npz_stream import StreamedArray, streamed_arrays

PASS_BYTES = 850_000_000
"""What is held at most, unless a single part is larger: two layers of GPT-J 6B in bfloat16, or one
in float32."""
_MAX_VECTOR_BYTES = 4 << 20
_MAX_HELD_BYTES = 512 << 20
_HEADER_BYTES = 1 << 10
_SHARD_FILE = re.compile(r"((?:.+/)?)shard_(0|[1-9]\d{0,5})/(0|[1-9]\d?)\.npz")
_Place = tuple[int, int]
"""Shard, and number of the file in it."""


class Archive:
    """What the first pass found."""

    def __init__(self, path: Path) -> None:
        """Reads the whole stream once.

        Raises:
            BadInputError: it is damaged, or holds something else than a checkpoint.
        """
        self.path = path
        self.headers: dict[_Place, list[NpyHeader]] = {}
        self.vectors: dict[tuple[int, int, int], np.ndarray] = {}
        """Counts and vectors, by shard, file and place in it."""
        self._documents: dict[str, bytes] = {}
        self._held_bytes = self._array_bytes = 0
        of_roots: dict[str, dict[_Place, list[NpyHeader]]] = {}
        vectors: dict[str, dict[tuple[int, int, int], np.ndarray]] = {}
        for file in archived_files(path):
            match = _SHARD_FILE.fullmatch(file.name)
            if match is None:
                self._keep_document(file)
                continue
            root, place = match[1], (int(match[2]), int(match[3]))
            headers = of_roots.setdefault(root, {}).setdefault(place, [])
            for number, array in streamed_arrays(file, f"{path}: {file.name}"):
                self._hold(_HEADER_BYTES)
                self._count(array)
                headers.append(array.header)
                if len(array.header.shape) < 2:
                    vectors.setdefault(root, {})[*place, number] = self._vector(array)
        self.root = self._choose_root(list(of_roots))
        self.headers, self.vectors = of_roots[self.root], vectors.get(self.root, {})

    @property
    def config_files(self) -> list[mtj_finding.ConfigFile]:
        """Returns the JSON files in the archive."""
        return [
            (f"{self.path}/{name}", lambda data=data: data)
            for name, data in self._documents.items()
        ]

    def arrays(
        self, wanted: Callable[[_Place], bool]
    ) -> Iterator[tuple[_Place, int, StreamedArray]]:
        """Yields (file, place in it, array) of the wanted files, in a new pass."""
        for file in archived_files(self.path):
            match = _SHARD_FILE.fullmatch(file.name)
            place = (int(match[2]), int(match[3])) if match and match[1] == self.root else None
            if place is None or not wanted(place):
                continue
            for number, array in streamed_arrays(file, f"{self.path}: {file.name}"):
                if self.headers.get(place, [])[number : number + 1] != [array.header]:
                    raise BadInputError(f"{self.path} changed while it was being read")
                yield place, number, array

    def _keep_document(self, file: ArchivedFile) -> None:
        if not file.name.endswith(".json") or file.num_bytes > MAX_CONFIG_BYTES:
            raise BadInputError(
                f"{self.path}: {file.name} is no part of a checkpoint of the original's; refused"
            )
        self._hold(file.num_bytes)
        self._documents[file.name] = bytes(file.take(file.num_bytes))

    def _vector(self, array: StreamedArray) -> np.ndarray:
        size = array.header.data_bytes
        if size > _MAX_VECTOR_BYTES:
            raise BadInputError(
                f"{array.where} is a vector of {size} bytes; at most {_MAX_VECTOR_BYTES} are read"
            )
        self._hold(size)
        result = np.empty(array.header.shape, array.header.dtype)
        array.read_into(result)
        return result

    def _count(self, array: StreamedArray) -> None:
        """Refuses, before it is inflated, what would grow a second time within the archive."""
        self._array_bytes += array.header.data_bytes
        if self._array_bytes > FREE_BYTES + MAX_GROWTH * self.path.stat().st_size:
            raise BadInputError(
                f"{array.where} and those before it grow to more than {MAX_GROWTH} times the "
                "archive's bytes, which weights do not; refused"
            )

    def _hold(self, num_bytes: int) -> None:
        self._held_bytes += num_bytes
        if self._held_bytes > _MAX_HELD_BYTES:
            raise BadInputError(
                f"{self.path} has more than {_MAX_HELD_BYTES} bytes of headers and vectors; refused"
            )

    def _choose_root(self, roots: Sequence[str]) -> str:
        """Returns the folder of the shards that count, ending in `/` unless it is the archive."""
        if not roots:
            raise BadInputError(f"{self.path} has no shard_0/0.npz: it is no checkpoint")
        steps = {mtj_finding.step_of_name(PurePosixPath(root).name): root for root in roots}
        parents = {str(PurePosixPath(root).parent) for root in roots}
        meta = str(PurePosixPath(min(parents)) / mtj_finding.META_NAME)
        if len(roots) == 1 and (None in steps or meta not in self._documents):
            return roots[0]
        if None in steps or len(parents) > 1:
            raise BadInputError(
                f"{self.path} has several checkpoints ({', '.join(sorted(roots))}): unpack it"
            )
        present = [step for step in steps if step is not None]
        return steps[
            mtj_finding.choose_step(present, self._documents.get(meta), f"{self.path}: {meta}")
        ]


class ArchiveStore(Store):
    """The shards of an archive."""

    def __init__(self, archive: Archive) -> None:
        """Raises BadInputError where shards or files are missing or too many."""
        where = f"{archive.path}: {archive.root}"
        self._archive = archive
        shards = {shard for shard, _ in archive.headers}
        self.shards = count_shards([f"shard_{shard}" for shard in shards], where)
        headers: list[list[NpyHeader]] = []
        names: list[list[str]] = []
        for shard in range(self.shards):
            folder = f"{where}shard_{shard}"
            check_files([f"{f}.npz" for s, f in archive.headers if s == shard], folder)
            of_files = [archive.headers[shard, file] for file in range(FILES_PER_SHARD)]
            check_split([len(of_file) for of_file in of_files], folder)
            headers.append([header for of_file in of_files for header in of_file])
            places = files_of(len(headers[-1]))
            names.append([f"{folder}/{file}.npz arr_{place}" for file, place in places])
        self.headers, self.names = headers, names
        self._places = files_of(len(headers[0]))
        self._held: dict[Leaf, np.ndarray] = {}

    def counter(self, number: int) -> np.ndarray:
        return np.stack([self._vector(shard, number) for shard in range(self.shards)])

    def joined(self, leaf: Leaf) -> np.ndarray:
        result = self.empty(leaf)
        for shard, target in enumerate(leaf.layout.arrays(result, self.shards)):
            target[...] = self._vector(shard, leaf.number)
        return result

    def raw(self, leaf: Leaf, shard: int) -> np.ndarray:
        return self._vector(shard, leaf.number)

    def prepare(self, parts: Sequence[Sequence[Leaf]]) -> Reader:
        wanted = self._matrices(parts[0])
        if any(leaf not in self._held for leaf in wanted):
            self._held = {}
            self._read(self._within_budget(parts))
        return _Held(self, {leaf: self._held[leaf] for leaf in wanted})

    def release(self) -> None:
        """Lets go of all matrices."""
        self._held = {}

    def drop(self, leaves: Iterable[Leaf]) -> None:
        """Lets go of some matrices."""
        for leaf in leaves:
            self._held.pop(leaf, None)

    def _matrices(self, part: Iterable[Leaf]) -> list[Leaf]:
        return [leaf for leaf in part if len(self.headers[0][leaf.number].shape) == 2]

    def _within_budget(self, parts: Iterable[Iterable[Leaf]]) -> list[Leaf]:
        """Returns the matrices of the first part, and of as many others as may be held with it."""
        chosen: list[Leaf] = []
        num_bytes = 0
        for part in map(self._matrices, parts):
            num_bytes += sum(self.headers[0][leaf.number].data_bytes * self.shards for leaf in part)
            if chosen and num_bytes > PASS_BYTES:
                break
            chosen += part
        return chosen

    def _read(self, wanted: Sequence[Leaf]) -> None:
        """Fills what is held with these tensors, in one pass."""
        self._held |= {leaf: self.empty(leaf) for leaf in wanted}
        leaves = {self._places[leaf.number]: leaf for leaf in wanted}
        files = {file for file, _ in leaves}
        missing = len(leaves) * self.shards
        for (shard, file), number, array in self._archive.arrays(lambda place: place[1] in files):
            leaf = leaves.get((file, number))
            if leaf is not None:
                array.read_into(leaf.layout.arrays(self._held[leaf], self.shards)[shard])
                missing -= 1
        if missing:
            raise BadInputError(f"{self._archive.path} changed while it was being read")

    def _vector(self, shard: int, number: int) -> np.ndarray:
        file, place = self._places[number]
        return self._archive.vectors[shard, file, place]


class _Held(Reader):
    """The matrices of one part, and the vectors of all."""

    def __init__(self, store: ArchiveStore, matrices: dict[Leaf, np.ndarray]) -> None:
        self._store, self._matrices = store, matrices

    def joined(self, leaf: Leaf) -> np.ndarray:
        held = self._matrices.get(leaf)
        return self._store.joined(leaf) if held is None else held

    def raw(self, leaf: Leaf, shard: int) -> np.ndarray:
        held = self._matrices.get(leaf)
        if held is None:
            return self._store.raw(leaf, shard)
        return leaf.layout.arrays(held, self._store.shards)[shard]

    def release(self) -> None:
        self._store.drop(self._matrices)
        self._matrices = {}
