"""What MeshLM takes from inside of JAX, which has no public name and may move."""

from typing import Any


def distributed_state() -> Any:
    """Returns JAX's connection of this process to the others: its client and coordinator."""
    from jax._src import distributed

    return distributed.global_state


def runs_on_cloud_tpus() -> bool:
    """Returns whether JAX takes this machine for one of a cloud's TPU machines."""
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def complete_place(
    address: str | None, count: int | None, number: int | None, timeout_s: int
) -> tuple[str | None, int | None, int | None, Any]:
    """Returns coordinator, processes, this one's number and its devices, as a scheduler says.

    Raises:
        RuntimeError, OSError: JAX could not ask it.
    """
    from jax._src import clusters

    return clusters.ClusterEnv.auto_detect_unset_distributed_params(
        address, count, number, None, None, timeout_s
    )
