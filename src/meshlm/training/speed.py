"""How long a step takes, measured before a run begins."""

import time

import jax
import numpy as np

from meshlm.core.sharding import MeshConfig, make_mesh, use_mesh
from meshlm.data.loader import Batch
from meshlm.step import compile_train_step, init_state
from meshlm.training.batches import local_rows, to_device
from meshlm.training.config import RunConfig

_MEASURED_STEPS = 5


def measure_step_s(record: RunConfig, mesh_config: MeshConfig) -> float:
    """Returns the median seconds of a training step of this run, compilation left out.

    The state and the batch are made for it and dropped again.
    """
    mesh = make_mesh(mesh_config)
    step_config = record.step_config(None, mesh_config)
    shape = (len(local_rows(mesh, record.batch_size)), record.seq_len)
    zeros = np.zeros(shape, np.int32)
    rows = Batch(tokens=zeros, targets=zeros, loss_mask=np.ones(shape, np.float32))
    times_s = []
    with use_mesh(mesh):
        state = jax.jit(lambda: init_state(step_config, 0))()
        batch = to_device(rows, mesh, record.batch_size)
        step = compile_train_step(step_config)
        for _ in range(1 + _MEASURED_STEPS):
            began_s = time.monotonic()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times_s.append(time.monotonic() - began_s)
    return float(np.median(times_s[1:]))
