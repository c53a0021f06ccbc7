"""Layouts: how the arrays of a format hold a native tensor, exactly and both ways.

A format that cuts a model into shards has one array a shard for each native tensor; the others have
one. `split` returns what the files are to hold, and `join` inverts it bit for bit. Where the arrays
of the shards come one by one, make an array of `store_shape`, copy each into its view in `arrays`,
and take `native`.

The layouts of the other families are `Rearranged` patterns: transposed matrices, folded heads,
shards, and queries, keys and values fused in one matrix, are all the same elements in another order
(`three N H D -> D (three N H)` is GPT-2's fused matrix, `three N H D -> (N three H) D` GPT-NeoX's).
"""

import abc
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]
SHARDS = "S"
"""The axis of a pattern that counts shards."""
_PATTERN = re.compile(r"(.+) -> (.+)")
_GROUP = re.compile(r"\(([\w ]+)\)|(\w+)")


class Layout(abc.ABC):
    """How `shards` arrays hold one native tensor."""

    has_more: bool
    """Whether the arrays of the shards hold numbers that the native tensor does not."""

    @abc.abstractmethod
    def store_shape(self, shape: Shape, shards: int) -> Shape:
        """Returns the shape of the array that all shards are read into.

        Args:
            shape: of the native tensor.
        """

    @abc.abstractmethod
    def array_shape(self, shape: Shape, shards: int = 1) -> Shape:
        """Returns the shape of the array of one shard, of a native tensor of `shape`."""

    @abc.abstractmethod
    def arrays(self, store: np.ndarray, shards: int) -> Sequence[np.ndarray]:
        """Returns the views of a contiguous store that are the arrays of the shards."""

    @abc.abstractmethod
    def native(self, store: np.ndarray) -> np.ndarray:
        """Returns the native tensor of a store."""

    def join(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        """Returns the native tensor that the arrays of the shards hold: what `split` got.

        Args:
            shape: of the native tensor.
        """
        store = np.empty(self.store_shape(shape, len(arrays)), arrays[0].dtype)
        for view, array in zip(self.arrays(store, len(arrays)), arrays, strict=True):
            view[...] = array
        return self.native(store)

    def native_dtype(self, stored: np.dtype, shards: int) -> np.dtype:
        """Returns the dtype of the native tensor whose arrays are `stored`."""
        return stored

    @abc.abstractmethod
    def split(self, native: np.ndarray, shards: int, dtype: np.dtype) -> Sequence[np.ndarray]:
        """Returns the arrays of the shards that `native` reads back as the same bits.

        Args:
            dtype: of the arrays that are computed and not copied, where that loses nothing.
        """


class Rearranged(Layout):
    """The same elements with the dims in another order, folded into one another or cut.

    A pattern names the native dims, then those of the arrays: `(S n) H D -> S D (n H)` cuts the
    heads of a [N, H, D] into shards, folds the heads' dims and transposes. `S` counts the shards,
    and comes first among the dims of the arrays. Without it there is one array. A number is an axis
    of that size.
    """

    has_more = False

    def __init__(self, pattern: str) -> None:
        match = _PATTERN.fullmatch(pattern)
        assert match, pattern
        self._native, self._array = (_parse(side) for side in match.groups())
        native, array = (sum(side, ()) for side in (self._native, self._array))
        assert sorted(native) == sorted(set(array)) == sorted(array), pattern
        self._is_cut = SHARDS in native
        assert not self._is_cut or self._array[0] == (SHARDS,), pattern
        self._order = [native.index(axis) for axis in array]

    def store_shape(self, shape: Shape, shards: int) -> Shape:
        return shape

    def array_shape(self, shape: Shape, shards: int = 1) -> Shape:
        folded = _folded(self._array, self._sizes(shape, shards))
        return tuple(folded[1:] if self._is_cut else folded)

    def arrays(self, store: np.ndarray, shards: int) -> Sequence[np.ndarray]:
        sizes = self._sizes(store.shape, shards)
        permuted = store.reshape(list(sizes.values())).transpose(self._order)
        result = permuted.reshape(_folded(self._array, sizes))
        return list(result) if self._is_cut else [result]

    def native(self, store: np.ndarray) -> np.ndarray:
        return store

    def split(self, native: np.ndarray, shards: int, dtype: np.dtype) -> Sequence[np.ndarray]:
        return self.arrays(native, shards)

    def join(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        if self._is_cut:
            return super().join(arrays, shape)
        # A view of the only array, wherever that can be.
        sizes = self._sizes(shape, 1)
        unfolded = arrays[0].reshape([sizes[axis] for group in self._array for axis in group])
        return unfolded.transpose(np.argsort(self._order)).reshape(shape)

    def _sizes(self, shape: Shape, shards: int) -> dict[str, int]:
        """Returns the size of each axis, in the native order."""
        sizes: dict[str, int] = {}
        for group, size in zip(self._native, shape, strict=True):
            known = {axis: int(axis) for axis in group if axis.isdigit()}
            known |= {axis: shards for axis in group if axis == SHARDS}
            rest, left = divmod(size, math.prod(known.values()))
            assert left == 0, (shape, shards)
            sizes |= {axis: known.get(axis, rest) for axis in group}
        assert math.prod(sizes.values()) == math.prod(shape), "two unknown axes in one dim"
        return sizes


@functools.cache
def _parse(side: str) -> tuple[tuple[str, ...], ...]:
    """Returns the axes of each dim: (("S",), ("D",), ("n", "H")) for `S D (n H)`."""
    return tuple(tuple((folded or axis).split()) for folded, axis in _GROUP.findall(side))


def _folded(groups: Sequence[Sequence[str]], sizes: dict[str, int]) -> list[int]:
    return [math.prod(sizes[axis] for axis in group) for group in groups]
