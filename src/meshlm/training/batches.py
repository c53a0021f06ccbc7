"""Batches from the loader onto the mesh: each process brings the rows that its devices hold."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshlm.core.sharding import sharding_of
from meshlm.data.loader import Batch
from meshlm.step import StepBatch


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that the devices of this process hold, in order.

    They need not follow each other: a mesh is laid over the devices as its collectives want it.
    """
    sharding = sharding_of(mesh, "batch", None)
    held = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    parts = [index[0] for index in held if index is not None]
    return sorted({row for part in parts for row in range(*part.indices(batch_size))})


def to_device(batch: Batch, mesh: Mesh, batch_size: int) -> StepBatch:
    """Returns the global batch on the mesh, from this process's `local_rows` of it."""
    rows = local_rows(mesh, batch_size)
    return StepBatch(
        tokens=put_rows(batch.tokens, rows, mesh, batch_size),
        targets=put_rows(batch.targets, rows, mesh, batch_size),
        loss_mask=put_rows(batch.loss_mask, rows, mesh, batch_size),
        segment_ids=None
        if batch.segment_ids is None
        else put_rows(batch.segment_ids, rows, mesh, batch_size),
    )


def put_rows(values: np.ndarray, rows: Sequence[int], mesh: Mesh, batch_size: int) -> jax.Array:
    """Returns the array of `batch_size` rows on the mesh, of which `values` are those `rows`."""

    def part(index: Any) -> np.ndarray:
        wanted = range(*index[0].indices(batch_size))
        first = place[wanted.start]
        return values[first : first + len(wanted)]

    place = {row: i for i, row in enumerate(rows)}
    shape = (batch_size, *values.shape[1:])
    sharding = sharding_of(mesh, "batch", *(None for _ in shape[1:]))
    return jax.make_array_from_callback(shape, sharding, part)
