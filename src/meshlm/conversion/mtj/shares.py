"""Layouts of tensors of which every shard of mesh-transformer-jax has an array of the full shape.

Dim letters: S shards.
"""

from collections.abc import Sequence

import numpy as np

from meshlm.conversion.layout import Layout, Shape

_FLOAT32 = np.dtype(np.float32)


class _OfFullShape(Layout):
    """Arrays [S, ...] of the native tensor's shape."""

    has_more = True

    def store_shape(self, shape: Shape, shards: int) -> Shape:
        return (shards, *shape)

    def array_shape(self, shape: Shape, shards: int = 1) -> Shape:
        return shape

    def arrays(self, store: np.ndarray, shards: int) -> Sequence[np.ndarray]:
        return list(store)


class Replicas(_OfFullShape):
    """The first shard's array is the tensor; those of the others are not used."""

    def __init__(self, fill: float | None) -> None:
        """Args: fill: what is written for the other shards; None for copies of the first."""
        self._fill = fill

    def native(self, store: np.ndarray) -> np.ndarray:
        return store[0]

    def split(self, native: np.ndarray, shards: int, dtype: np.dtype) -> Sequence[np.ndarray]:
        other = native if self._fill is None else np.full_like(native, self._fill)
        return [native] + [other] * (shards - 1)


class Shares(_OfFullShape):
    """The tensor is the sum of all arrays, in float32; as stored where there is one."""

    def native(self, store: np.ndarray) -> np.ndarray:
        if len(store) == 1:
            return store[0]
        with np.errstate(over="ignore", invalid="ignore"):
            return store.astype(np.float64).sum(axis=0).astype(np.float32)

    def native_dtype(self, stored: np.dtype, shards: int) -> np.dtype:
        return stored if shards == 1 else _FLOAT32

    def split(self, native: np.ndarray, shards: int, dtype: np.dtype) -> Sequence[np.ndarray]:
        """Returns shares in `dtype` or, where their sum cannot be exact in it, wider.

        They are equal if that is exact, as training with mesh-transformer-jax leaves them. Else the
        first shard has all of it, or what fits into the dtype, and the next ones what is left.
        """
        if shards == 1:
            return [native]
        wide = native.astype(np.float64)
        equal = (wide / shards).astype(dtype)
        if shards & (shards - 1) == 0 and is_same(equal.astype(np.float64) * shards, wide):
            return [equal] * shards
        shares: list[np.ndarray] = []
        for _ in range(shards):
            with np.errstate(over="ignore", invalid="ignore"):
                shares.append(wide.astype(dtype))
                wide = wide - shares[-1].astype(np.float64)
        if is_same(self.native(np.stack(shares)), native.astype(_FLOAT32)):
            return shares
        return [native, *[np.zeros_like(native)] * (shards - 1)]


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays are the same bit for bit."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
