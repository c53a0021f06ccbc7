"""Where the mesh's axes lie on the wires that join the devices."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from meshlm.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Place:
    """A device of a torus that need not be here: all that its placement depends on."""

    id: int
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int
    process_index: int
    slice_index: int = 0
    platform: str = "tpu"


def place_devices(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices as an array of the mesh's shape, neighbours in it near to each other.

    On a torus of TPUs each axis takes whole dims of it where its size allows that, the last axis
    first: tensor parallelism sends most. Where it does not, a dim is cut among axes. On v2 and v3
    devices stay in the order of their hosts of 2 x 2 chips, so that a `model` axis of 2, 4 or 8
    stays within one. Slices of TPUs, which only a network joins, are split by the first axis.

    Raises:
        UsageError: the first axis does not divide among the slices, or not all of each is used.
    """
    slices = collections.Counter(map(slice_of, devices))
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len(set(slices.values())) > 1:
        raise UsageError(
            f"--mesh.* of {len(devices)} devices: of {len(slices)} slices, which only a network "
            "joins, all or none of the devices can be used"
        )
    if shape[0] % len(slices):
        raise UsageError(
            f"--mesh.replica {shape[0]}: the devices are in {len(slices)} slices, which only a "
            f"network joins: give a multiple of {len(slices)}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // len(slices), *shape[1:]),
        (len(slices), *(1 for _ in shape[1:])),
        devices,
        allow_split_physical_axes=True,
    )


def slice_of(device: Any) -> int:
    """Returns the slice of TPUs that a device is in. (Of GPUs JAX counts each host as one.)"""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def extents(placed: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Returns for each axis of placed devices how many places it takes along each torus dim.

    The last number is that of the cores in a chip: (8, 4, 1, 1) are 8 x 4 chips, (1, 1, 1, 2) the
    two cores of one.
    """
    found = []
    for axis in range(placed.ndim):
        line = np.moveaxis(placed, axis, 0).reshape(placed.shape[axis], -1)[:, 0]
        places = [(*device.coords, device.core_on_chip) for device in line]
        found.append(tuple(len(set(column)) for column in zip(*places, strict=True)))
    return tuple(found)
