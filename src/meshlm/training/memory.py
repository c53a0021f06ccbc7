"""Is there memory for the run at all? What certainly does not fit is refused before it begins."""

import os

import jax.numpy as jnp

from meshlm.core.errors import UsageError
from meshlm.core.platform import device_facts
from meshlm.core.sharding import MeshConfig
from meshlm.model.params import count_params
from meshlm.ops import cpu
from meshlm.ops.loss import CHUNK_ROWS
from meshlm.training.config import RunConfig

# Weights, two moments of the optimizer and the gradient, float32 each.
_STATE_BYTES = 16
_LOGIT_BYTES = 4


def least_memory_bytes(record: RunConfig, mesh: MeshConfig) -> tuple[int, int]:
    """Returns (bytes of the state and the gradients, bytes of the logits) over all devices.

    What activations take comes on top, so a run that needs no more than this may still not fit.
    """
    state = _STATE_BYTES * count_params(record.model) * mesh.replica
    tokens = record.batch_size // record.accumulate * record.seq_len
    if cpu.is_faster(jnp.dtype(record.compute_dtype)) and mesh.num_devices == 1:
        tokens = min(tokens, CHUNK_ROWS)
    return state, _LOGIT_BYTES * tokens * record.model.vocab_size


def check_memory(record: RunConfig, mesh: MeshConfig) -> None:
    """Raises UsageError, with the bytes needed and there, where a run cannot fit.

    Nothing is refused on devices whose memory is not known.
    """
    facts = device_facts()
    if facts.platform == "cpu":  # however many devices there are, they share it
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif facts.memory_bytes is not None:
        there = facts.memory_bytes * mesh.num_devices
    else:
        return
    state, logits = least_memory_bytes(record, mesh)
    if state + logits > there:
        raise UsageError(
            f"this run needs more than {(state + logits) / 1e9:,.1f} GB of memory "
            f"({state / 1e9:,.1f} for weights, optimizer and gradients, {logits / 1e9:,.1f} for "
            f"logits) and {there / 1e9:,.1f} GB are there: choose a smaller --preset or "
            "--batch-size, raise --accumulate, or use more devices"
        )
