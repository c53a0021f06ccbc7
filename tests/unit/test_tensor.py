"""Some rows of an array at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meshlm.formats.tensor import BLOCK_NUMBERS, row_blocks


@given(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), st.integers(1, 100))
def test_row_blocks_are_all_rows_once(shape, numbers):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    blocks = [array[rows] for rows in row_blocks(shape, numbers)]
    if not shape:
        assert blocks == [array]
        return
    assert sum(len(block) for block in blocks) == shape[0]
    assert all(block.size <= numbers or len(block) == 1 for block in blocks)
    assert np.array_equal(np.concatenate([array[:0], *blocks]), array)


def test_blocks_of_the_usual_size():
    assert list(row_blocks((3, BLOCK_NUMBERS // 2))) == [slice(0, 2), slice(2, 3)]
    assert list(row_blocks((2, 2 * BLOCK_NUMBERS))) == [slice(0, 1), slice(1, 2)]
    assert list(row_blocks((BLOCK_NUMBERS,))) == [slice(0, BLOCK_NUMBERS)]
