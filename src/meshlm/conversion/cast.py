"""Tensors in another dtype; a finite number that becomes infinite is refused."""

import dataclasses

import ml_dtypes
import numpy as np

from meshlm.conversion.finite import Place, is_finite
from meshlm.conversion.source import Part
from meshlm.core.errors import BadInputError
from meshlm.formats.tensor import row_blocks


class CastPart(Part):
    """Another part's tensors in one dtype."""

    def __init__(self, part: Part, dtype: np.dtype) -> None:
        self._part, self._dtype = part, dtype
        self.key, self.raw = part.key, part.raw
        self.tensors = {
            name: dataclasses.replace(info, dtype=dtype) for name, info in part.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return cast(self._part.read(name), self._dtype, name)

    def place(self, name: str) -> Place:
        return self._part.place(name)

    def read_raw(self, name: str) -> np.ndarray:
        return self._part.read_raw(name)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns the array in `dtype`.

    Raises:
        BadInputError: a finite number is too large for it.
    """
    if array.dtype == dtype:
        return array
    result = np.empty(array.shape, dtype)
    narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max
    for rows in row_blocks(array.shape):
        with np.errstate(over="ignore"):
            result[rows] = array[rows]
        if not narrower or is_finite(result[rows]):
            continue
        if (np.isinf(result[rows]) & ~np.isinf(array[rows])).any():
            raise BadInputError(
                f"{name} has numbers too large for {dtype.name}: choose another --dtype"
            )
    return result
