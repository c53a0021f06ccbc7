"""Is there memory for the run at all? What certainly does not fit is refused before it begins."""

import os

import jax.numpy as jnp

from meshlm.core.errors import UsageError
from meshlm.core.platform import device_facts
from meshlm.core.sharding import MeshConfig
from meshlm.model.params import count_params
from meshlm.ops import cpu
from meshlm.ops.loss import CHUNK_ROWS
from meshlm.optim import OptimizerName
from meshlm.training.config import RunConfig

# Weights, gradient and AdamW's two moments, float32 each; adafactor's state is next to nothing.
_STATE_BYTES: dict[OptimizerName, int] = {"adamw": 16, "adafactor": 8}
_FLOAT_BYTES = 4


def least_memory_bytes(record: RunConfig, mesh: MeshConfig) -> tuple[int, int]:
    """Returns (bytes of the state and the gradients, bytes of activations) over all devices.

    Of the activations only what every way to compute keeps is counted: the residual stream before
    each layer, and the logits that exist at once. So what needs no more may still not fit.
    """
    model = record.model
    state = _STATE_BYTES[record.optimizer.name] * count_params(model) * mesh.replica
    tokens = record.batch_size // record.accumulate * record.seq_len
    chunked = cpu.is_faster(jnp.dtype(record.compute_dtype)) and mesh.num_devices == 1
    logits = (min(tokens, CHUNK_ROWS) if chunked else tokens) * model.vocab_size
    return state, _FLOAT_BYTES * (tokens * model.num_layers * model.d_model + logits)


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
    state, activations = least_memory_bytes(record, mesh)
    if state + activations > there:
        raise UsageError(
            f"this run needs more than {(state + activations) / 1e9:,.1f} GB of memory "
            f"({state / 1e9:,.1f} for weights, optimizer and gradients, {activations / 1e9:,.1f} "
            f"for activations) and {there / 1e9:,.1f} GB are there: choose a smaller --preset or "
            "--batch-size, raise --accumulate, or use more devices"
        )
