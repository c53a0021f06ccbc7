"""Devices that a step is planned for: their data sheet, their number and how they are joined."""

import dataclasses

from meshlm.core.platform import DeviceFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interconnect:
    """What joins the devices. None means not known."""

    link_bytes_per_s: float | None
    """One link of a chip, in one direction."""
    links: int
    """Links of a chip: two for each dim of a torus; 1 to a switch."""
    network_bytes_per_s: float | None
    """A device's share of its host's network, in one direction: between slices and between hosts of
    GPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A number of devices of one kind, joined in one way."""

    name: str
    """As it was asked for: v3:16x8, H100:64, here."""
    device_kind: str
    num_devices: int
    chips: tuple[int, ...]
    """The torus' shape; empty where there is none."""
    wraps: tuple[bool, ...]
    """For each dim of the torus: are its ends joined?"""
    devices_per_chip: int
    """Devices that share a chip's links and memory: 2 on TPU v2, v3 and v7x, else 1."""
    devices_per_host: int
    """GPUs that a fast switch joins; of TPUs, those of one host."""
    facts: DeviceFacts
    interconnect: Interconnect
    compiles: bool
    """Can a step be compiled for it here, given the compiler?"""


def find_topology(name: str) -> Topology:
    """Returns the topology of a name: v3:16x8 (TPU chips), H100:64 (GPUs), here (this machine).

    Raises:
        UsageError: there is none.
    """
    raise NotImplementedError(name)
