"""Refusing weights that hold NaN or infinities, at about the speed of memory.

The bits of a floating-point number, taken as a signed integer, order the positive numbers, with NaN
above infinity above all others; taken as an unsigned one they order the negative numbers by their
size, above all positive ones. So two maxima of integers tell whether all numbers are finite. They
are the same for every type, bfloat16 included, and read memory about as fast as it can be read;
numpy's `isfinite` is as fast for float32 and ten times slower for bfloat16.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from meshlm.core.errors import BadInputError
from meshlm.formats.tensor import row_blocks

# It is still in the cache of a core for its second maximum, and the calls per block cost little.
_BLOCK_NUMBERS = 1 << 18


class Place(NamedTuple):
    """Where a person finds a tensor."""

    name: str
    """Its file, or its checkpoint, and its name there."""
    shape: tuple[int, ...]
    """Its shape there: the same numbers in the same order as natively."""


def check_finite(array: np.ndarray, place: Place) -> None:
    """Raises BadInputError where a floating-point array holds NaN or infinities.

    Args:
        array: of any layout; one that is not contiguous is copied block by block.
        place: what the message calls the array, and the shape in which it counts the index.
    """
    if not is_finite(array):
        raise BadInputError(describe_not_finite(array, place))


def describe_not_finite(array: np.ndarray, place: Place) -> str:
    """Returns what is to be said of an array that holds NaN or infinities."""
    num_nan = num_infinite = done = 0
    first: int | None = None
    for block in _blocks(array):
        values = block.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(values))
        num_nan += int(np.isnan(values).sum())
        num_infinite += int(np.isinf(values).sum())
        if first is None and bad.size:
            first = done + int(bad[0])
        done += block.size
    assert first is not None
    index = list(map(int, np.unravel_index(first, place.shape)))
    kinds = [(num_nan, "NaN"), (num_infinite, "infinite")]
    counts = " and ".join(f"{count:,} {kind}" for count, kind in kinds if count)
    return (
        f"{place.name}: {counts} of {array.size:,} numbers, the first at {index}: these weights "
        "cannot be used; get them again, or use a checkpoint from before training diverged"
    )


def is_finite(array: np.ndarray) -> bool:
    """Returns whether a floating-point array holds neither NaN nor infinities."""
    width = array.dtype.itemsize
    infinity = np.array(np.inf, array.dtype).view(f"i{width}")
    largest, least = int(infinity), int((-np.array(np.inf, array.dtype)).view(f"u{width}"))
    return all(
        block.view(f"i{width}").max() < largest and block.view(f"u{width}").max() < least
        for block in _blocks(array)
    )


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields all numbers in C order, flat and contiguous, a block at a time."""
    for rows in row_blocks(array.shape):
        flat = np.ascontiguousarray(array[rows]).reshape(-1)
        for start in range(0, flat.size, _BLOCK_NUMBERS):
            yield flat[start : start + _BLOCK_NUMBERS]
