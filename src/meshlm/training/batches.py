"""Batches from the loader onto the mesh: each process brings the rows that its devices hold."""

import jax
import numpy as np
from jax.sharding import Mesh

from meshlm.core.sharding import sharding_of
from meshlm.data.loader import Batch
from meshlm.step import StepBatch


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Returns the first row of a global batch that is held here, and the one after the last."""
    sharding = sharding_of(mesh, "batch", None)
    held = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    slices = [index[0] for index in held if index is not None]
    starts = [part.start or 0 for part in slices]
    stops = [batch_size if part.stop is None else part.stop for part in slices]
    return min(starts), max(stops)


def to_device(batch: Batch, mesh: Mesh, batch_size: int) -> StepBatch:
    """Returns the global batch on the mesh, from this process's rows of it."""
    sharding = sharding_of(mesh, "batch", None)

    def put(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, rows.shape[1])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return StepBatch(
        tokens=put(batch.tokens),
        targets=put(batch.targets),
        loss_mask=put(batch.loss_mask),
        segment_ids=None if batch.segment_ids is None else put(batch.segment_ids),
    )


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Returns some rows of a whole batch."""
    segments = batch.segment_ids
    return Batch(
        tokens=batch.tokens[start:stop],
        targets=batch.targets[start:stop],
        loss_mask=batch.loss_mask[start:stop],
        segment_ids=None if segments is None else segments[start:stop],
    )
