"""Devices that a step is planned for: their data sheet, their number and how they are joined."""

import dataclasses
import itertools
import math
import re

from meshlm.core.errors import UsageError
from meshlm.core.placement import Place, extents, place_devices
from meshlm.core.platform import (
    DeviceFacts,
    Interconnect,
    device_facts,
    devices_per_chip,
    facts_of,
    has_tpu_compiler,
    interconnect_of,
)
from meshlm.core.sharding import AXES, MeshConfig
from meshlm.planning.hlo_slices import NUMBERS_OF_A_SLICE
from meshlm.planning.measuring import measured_cpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A number of devices of one kind, joined in one way."""

    name: str
    """As it was asked for: v3:16x8, 2xv5e:16x16, H100:64, here."""
    device_kind: str
    num_devices: int
    """Of all slices."""
    slices: int = 1
    """Tori of the same shape, which only the hosts' network joins."""
    chips: tuple[int, ...]
    """A torus' shape; empty where there is none."""
    wraps: tuple[bool, ...]
    """For each dim of the torus: are its ends joined?"""
    devices_per_chip: int
    """Devices that share a chip's links and memory: 2 on TPU v2, v3 and v7x, else 1."""
    devices_per_host: int
    """GPUs that a fast switch joins; of TPUs, those of one host."""
    facts: DeviceFacts
    interconnect: Interconnect
    compiles: bool
    """A step can be compiled for it by what is installed here."""


@dataclasses.dataclass(frozen=True)
class _Torus:
    """How slices of one generation of TPUs are built."""

    kind: str
    dims: int
    joined: tuple[int, ...] | None
    """Sizes at which a dim's ends are joined; None: slices of whole cubes of 4 x 4 x 4."""
    most_chips: int
    compiler: str
    """What the compiler calls the generation."""


# Source: the system architecture pages of Google Cloud's TPU documentation. A slice of v2, v3, v5e
# or v6e is cut out of the pod's torus, so only a dim as long as the pod's is a ring; in v4, v5p and
# v7x optical switches join whole cubes into rings.
_TORI = {
    "v2": _Torus("TPU v2", 2, (16,), 256, "v2"),
    "v3": _Torus("TPU v3", 2, (32,), 1024, "v3"),
    "v4": _Torus("TPU v4", 3, None, 4096, "v4"),
    "v5e": _Torus("TPU v5 lite", 2, (16,), 256, "v5e"),
    "v5p": _Torus("TPU v5", 3, None, 8960, "v5p"),
    "v6e": _Torus("TPU v6 lite", 2, (16,), 256, "v6e"),
    "v7x": _Torus("TPU7x", 3, None, 9216, "tpu7x"),
}
_GPUS = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
}
_CHIPS_OF_A_HOST = 4
_GPUS_OF_A_HOST = 8
_CUBE = 4
_MOST_GPUS = 100_000
_MOST_SLICES = 256
_SLICES = re.compile(r"([1-9][0-9]{0,3})x(?=v)")


def find_topology(name: str, dtype: str = "bfloat16") -> Topology:
    """Returns the topology of a name.

    v3:16x8 (TPU chips), 2xv5e:16x16 (two slices of them), H100:64 (GPUs), here (this machine).

    Args:
        name: of the topology.
        dtype: of the products' operands: a CPU here is measured with it. Data sheets have bfloat16.

    Raises:
        UsageError: there is none.
    """
    if name == "here":
        return _here(dtype)
    slices, generation, shape = _parts(name)
    if generation in _TORI:
        return _torus(name, _TORI[generation], shape, slices)
    if generation in _GPUS:
        return _gpus(name, _GPUS[generation], shape)
    raise UsageError(
        f"--topology {name}: give chips as {', '.join(_TORI)} have them (v3:16x8, v5p:4x8x8; "
        f"2xv5e:16x16 for two slices), GPUs as {', '.join(_GPUS)} (H100:64), or here"
    )


def _parts(name: str) -> tuple[int, str, str]:
    """Returns (slices, generation, shape) of a name as 2xv5e:16x16."""
    match = _SLICES.match(name)
    generation, _, shape = name[match.end() if match else 0 :].partition(":")
    return int(match.group(1)) if match else 1, generation, shape


def check_devices(mesh: MeshConfig, topology: Topology) -> None:
    """Raises UsageError where a mesh wants more devices than there are, or not whole slices."""
    wanted, there, slices = mesh.num_devices, topology.num_devices, topology.slices
    if wanted > there:
        raise UsageError(
            f"--mesh.* of {wanted} devices: {topology.name} has {there}: give a smaller mesh or a "
            "larger --topology"
        )
    if slices > 1 and (wanted < there or mesh.replica % slices):
        raise UsageError(
            f"--mesh.replica {mesh.replica} of {wanted} devices: {topology.name} has {there} in "
            f"{slices} slices, which only a network joins: use all, and a multiple of {slices}"
        )


def compiler_name(name: str) -> tuple[str, int]:
    """Returns what the compiler calls a slice of TPUs, and the number of slices."""
    slices, generation, shape = _parts(name)
    return f"{_TORI[generation].compiler}:{shape}", slices


def _torus(name: str, torus: _Torus, shape: str, slices: int) -> Topology:
    example = "x".join(["4"] * torus.dims)
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (torus.dims - 1), shape):
        raise UsageError(
            f"--topology {name}: give the chips of each of its {torus.dims} dims, as "
            f"{name.partition(':')[0]}:{example}"
        )
    if slices > _MOST_SLICES:
        raise UsageError(f"--topology {name}: give at most {_MOST_SLICES} slices")
    chips = tuple(int(size) for size in shape.split("x"))
    if math.prod(chips) > torus.most_chips:
        raise UsageError(
            f"--topology {name} is {math.prod(chips):,} chips a slice and a pod has "
            f"{torus.most_chips:,}: give fewer"
        )
    per_chip = devices_per_chip(torus.kind)
    in_slice = math.prod(chips) * per_chip
    devices = slices * in_slice
    whole_cubes = all(size % _CUBE == 0 for size in chips)
    wraps = tuple(whole_cubes if torus.joined is None else size in torus.joined for size in chips)
    return Topology(
        name=name,
        device_kind=torus.kind,
        num_devices=devices,
        slices=slices,
        chips=chips,
        wraps=wraps,
        devices_per_chip=per_chip,
        devices_per_host=min(in_slice, _CHIPS_OF_A_HOST * per_chip),
        facts=facts_of(torus.kind, "tpu", devices),
        interconnect=interconnect_of(torus.kind),
        compiles=has_tpu_compiler(),
    )


def _gpus(name: str, kind: str, count: str) -> Topology:
    if not re.fullmatch(r"[1-9]\d{0,5}", count) or int(count) > _MOST_GPUS:
        raise UsageError(f"--topology {name}: give the number of GPUs, as {name.split(':')[0]}:8")
    return Topology(
        name=name,
        device_kind=kind,
        num_devices=int(count),
        chips=(),
        wraps=(),
        devices_per_chip=1,
        devices_per_host=min(int(count), _GPUS_OF_A_HOST),
        facts=facts_of(kind, "gpu", int(count)),
        interconnect=interconnect_of(kind),
        compiles=False,
    )


def _here(dtype: str) -> Topology:
    """Returns this machine's devices (starts JAX). Of TPUs here the torus is not looked at."""
    facts = device_facts()
    if facts.platform == "cpu":
        facts = measured_cpu(facts, dtype)
    # A process may have one GPU of its host alone, so processes do not tell the hosts.
    here = min(facts.count, _GPUS_OF_A_HOST) if facts.platform == "gpu" else facts.count
    return Topology(
        name="here",
        device_kind=facts.kind,
        num_devices=facts.count,
        chips=(),
        wraps=(),
        devices_per_chip=devices_per_chip(facts.kind),
        devices_per_host=here,
        facts=facts,
        interconnect=interconnect_of(facts.kind),
        compiles=True,
    )


def axes_on_torus(topology: Topology, mesh: MeshConfig) -> dict[str, tuple[int, ...]]:
    """Returns how many places each mesh axis takes along each dim of the torus.

    The last number is that of cores in a chip: {"data": (8, 4, 1), "model": (2, 2, 2)} on a 2-D
    torus of v3 are 8 x 4 chips, and the 8 cores of 2 x 2 chips. It is what a run on such a slice
    does with its devices; where fewer than all are used, the first ones are. Of several slices
    `replica` has its places in each.
    """
    places = _places(topology)[: mesh.num_devices]
    placed = place_devices(tuple(getattr(mesh, axis) for axis in AXES), places)
    dims = len(topology.chips)
    found = zip(AXES, extents(placed), strict=True)
    return {axis: (*sizes[:dims], sizes[-1]) for axis, sizes in found}


def _places(topology: Topology) -> list[Place]:
    """Returns the devices in the order in which JAX has them: slice by slice."""
    places = _places_of_a_slice(topology)
    if topology.slices == 1:
        return places
    hosts = 1 + places[-1].process_index
    return [
        dataclasses.replace(
            place,
            id=NUMBERS_OF_A_SLICE * (index + 1) + place.id,
            process_index=hosts * index + place.process_index,
            slice_index=index,
        )
        for index in range(topology.slices)
        for place in places
    ]


def _places_of_a_slice(topology: Topology) -> list[Place]:
    """Returns the devices of one slice: host by host, of 2 x 2 x 1 chips."""
    x, y, z = (*topology.chips, 1)[:3]
    cores = topology.devices_per_chip
    hosts = itertools.product(range(z), range(-(-y // 2)), range(-(-x // 2)))
    places = []
    for host, (k, j, i) in enumerate(hosts):
        for dy, dx, core in itertools.product(range(2), range(2), range(cores)):
            coords = (2 * i + dx, 2 * j + dy, k)
            if coords[0] < x and coords[1] < y:
                number = ((coords[2] * y + coords[1]) * x + coords[0]) * cores + core
                places.append(Place(number, topology.device_kind, coords, core, host))
    return places
