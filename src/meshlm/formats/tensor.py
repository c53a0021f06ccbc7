"""Shape and dtype of a tensor, and the rows of an array, some at a time."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
BLOCK_NUMBERS = 1 << 20
"""Numbers that are read, written, copied or compared at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Returns its bytes in memory and in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def row_blocks(shape: tuple[int, ...], numbers: int | None = None) -> Iterator[Any]:
    """Yields indices that select all rows of an array, some at a time; `...` for one without dims.

    Args:
        shape: of the array.
        numbers: the most in a block, unless one row has more. [`BLOCK_NUMBERS`]
    """
    if not shape:
        yield ...
        return
    rows = max(1, (numbers or BLOCK_NUMBERS) // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
