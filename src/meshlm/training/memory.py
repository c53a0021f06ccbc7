"""Is there memory for the run at all? What certainly does not fit is refused before it begins."""

import os

from meshlm.core.errors import UsageError
from meshlm.core.platform import device_facts
from meshlm.core.processes import count
from meshlm.core.sharding import MeshConfig, current_rules
from meshlm.model.compute import ReduceDtype, Remat
from meshlm.ops.fast_attention import AttentionName
from meshlm.planning.memory import least_memory
from meshlm.planning.setup import Setup
from meshlm.training.config import RunConfig


def setup_of_run(
    record: RunConfig,
    mesh: MeshConfig,
    remat: Remat | None,
    attention: AttentionName = "plain",
    reduce_dtype: ReduceDtype = "float32",
) -> Setup:
    """Returns the run's step and how it is split by the rules that are entered."""
    return Setup(
        step=record.step_config(remat, mesh, attention, reduce_dtype),
        mesh=mesh,
        sharding=current_rules().name,
        batch_size=record.batch_size,
        seq_len=record.seq_len,
        document_mask=record.document_mask,
    )


def check_memory(record: RunConfig, mesh: MeshConfig) -> None:
    """Raises UsageError, with the bytes needed and there, where a run cannot fit.

    Nothing is refused on devices whose memory is not known, nor on the CPUs of several processes:
    how many of them share a machine's memory is not known either.
    """
    facts = device_facts()
    if facts.platform == "cpu":
        if count() > 1:
            return
        # However many devices there are, they share it.
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.num_devices
    elif facts.memory_bytes is not None:
        there = facts.memory_bytes
    else:
        return
    state, activations = least_memory(setup_of_run(record, mesh, None))
    if state + activations > there:
        raise UsageError(
            f"this run needs more than {(state + activations) / 1e9:,.1f} GB of memory a device "
            f"({state / 1e9:,.1f} for weights, optimizer and gradients, {activations / 1e9:,.1f} "
            f"for activations) and {there / 1e9:,.1f} GB are there: choose a smaller --preset or "
            "--batch-size, raise --accumulate, or use more devices"
        )
