"""Where a process finds its place among those of a run: options, environment, or a scheduler."""

import dataclasses
import os
from typing import Any

from meshlm.core.errors import MeshLMError, UsageError
from meshlm.core.jax_internals import complete_place, runs_on_cloud_tpus
from meshlm.core.waiting import Waiting

_ADDRESS, _COUNT, _NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Environments of several processes that JAX knows: the variables that are there in each of them.
_SCHEDULERS = (
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """How the processes of a run find each other; left out, the environment or scheduler says."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes train together. [JAX_COORDINATOR_ADDRESS]"""
    num_processes: int | None = None
    """Processes that train together. [JAX_NUM_PROCESSES, or what the scheduler says; 1]"""
    process_id: int | None = None
    """This process's number, from 0. [JAX_PROCESS_ID, or what the scheduler says]"""
    join_timeout_s: int = 300
    """Seconds to wait at the start for the other processes."""
    heartbeat_timeout_s: int = 60
    """Seconds without a sign of life after which a process counts as dead and all end."""

    def __post_init__(self) -> None:
        for name, least in (("join_timeout_s", 1), ("heartbeat_timeout_s", 5)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: give {least} or more"
                )


def find_place(config: ProcessConfig) -> tuple[str, int, int, Any] | None:
    """Returns (address, number of processes, this one's number, its devices), or None for one.

    Raises:
        UsageError: the settings are not complete or contradict each other.
        MeshLMError: the scheduler does not say what is missing.
    """
    address = config.coordinator or os.environ.get(_ADDRESS) or None
    count = _whole("--num-processes", config.num_processes, _COUNT)
    number = _whole("--process-id", config.process_id, _NUMBER)
    devices = None
    if count is not None and count < 1:
        raise UsageError(f"--num-processes {count}: give 1 or more")
    if count == 1:  # whatever a scheduler says
        return None
    if None in (address, count, number) and _is_scheduled():
        address, count, number, devices = _ask_scheduler(address, count, number, config)
    given = {"--coordinator": address, "--num-processes": count, "--process-id": number}
    missing = [option for option, value in given.items() if value is None]
    if len(missing) == 3 or count == 1:
        return None
    if missing:
        there = ", ".join(option for option in given if option not in missing)
        raise UsageError(
            f"{' and '.join(missing)} missing beside {there}: give all three, as options or as "
            f"{_ADDRESS}, {_COUNT} and {_NUMBER}"
        )
    assert address is not None
    assert count is not None
    assert number is not None
    if not 0 <= number < count:
        raise UsageError(f"--process-id {number} of --num-processes {count}: give 0 to {count - 1}")
    return address, count, number, devices


def _whole(option: str, given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise UsageError(f"{variable}={text} is no number: correct it, or give {option}")
    return int(text)


def _is_scheduled() -> bool:
    """Returns whether a scheduler that JAX knows has started this process as one of several."""
    sizes = (os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_SIZE"))
    if runs_on_cloud_tpus():
        return True
    return "1" not in sizes and any(all(v in os.environ for v in known) for known in _SCHEDULERS)


def _ask_scheduler(
    address: str | None, count: int | None, number: int | None, config: ProcessConfig
) -> tuple[str | None, int | None, int | None, Any]:
    """Returns the place with what JAX's own detection adds to it."""
    ask = "asking the scheduler which processes train together"
    try:
        with Waiting(lambda: ask, config.join_timeout_s):
            return complete_place(address, count, number, config.join_timeout_s)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MeshLMError(
            f"the scheduler does not say who trains together ({reason}): give --coordinator, "
            "--num-processes and --process-id"
        ) from None
