"""How fast devices along a mesh axis exchange: over a torus, between tori, or hosts of GPUs."""

import dataclasses
import functools
import math

from meshlm.core.sharding import AXES, Axes, MeshConfig
from meshlm.planning.topology import Topology, axes_on_torus
from meshlm.planning.work import wire_bytes

# Time of one hop between neighbours. Source: "How to Scale Your Model" (Austin et al., 2025),
# section 3: about a microsecond on a TPU's interconnect.
_HOP_S = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """What devices that differ in some mesh axes alone have between them."""

    bytes_per_s: float
    """Into one device, over all links that they use at once."""
    hops: float
    """From the farthest of them, along the longest dim."""


def transfer_s(
    op: str,
    size: float,
    axes: Axes,
    mesh: MeshConfig,
    topology: Topology,
    *,
    group: int | None = None,
    between_slices: bool = False,
) -> float | None:
    """Returns the seconds of one exchange over mesh axes; None where the links are not known.

    Over several slices it has two parts, as the compiler makes them: within each over its links,
    and of what each device then has of the array with its counterparts in the others. Where the
    network between slices is not known, the second part costs nothing.

    Args:
        op: its kind.
        size: bytes of the whole array on one device.
        axes: of the mesh.
        mesh: its sizes.
        topology: the devices.
        group: devices that take part together in one of the parts; None: in both, all along `axes`.
        between_slices: the group is the second part's.
    """
    inside, slices = group or mesh.shards(axes), 1
    if between_slices:
        inside, slices = 1, inside
    elif group is None and "replica" in axes:
        inside, slices = inside // topology.slices, topology.slices
    seconds = 0.0
    if inside > 1:
        route = find_route(axes, mesh, topology)
        if route is None:
            return None
        seconds = wire_bytes(op, size, inside) / route.bytes_per_s + route.hops * _HOP_S
    network = topology.interconnect.network_bytes_per_s
    if slices > 1 and network is not None:
        # The compiler scatters within slices only.
        between = "all-reduce" if op == "reduce-scatter" else op
        seconds += wire_bytes(between, size / inside, slices) / network
    return seconds


def find_route(axes: Axes, mesh: MeshConfig, topology: Topology) -> Route | None:
    """Returns what joins the devices along `axes`, of tori those of one slice.

    None where nothing is known of the links.
    """
    if topology.interconnect.link_bytes_per_s is None:
        return None
    return _torus(axes, mesh, topology) if topology.chips else _hosts(axes, mesh, topology)


def _torus(axes: Axes, mesh: MeshConfig, topology: Topology) -> Route:
    """A dim of the torus that a group of devices fills has two links into each chip if its ends are
    joined; one that it shares with other groups is a line with one."""
    link = topology.interconnect.link_bytes_per_s or 0.0
    laid = _laid(topology, mesh)
    *sizes, cores = (math.prod(places) for places in zip(*(laid[a] for a in axes), strict=True))
    links = [
        (2 if size == whole > 2 and wraps else 1) if size > 1 else 0
        for size, whole, wraps in zip(sizes, topology.chips, topology.wraps, strict=True)
    ]
    if not any(links):  # the cores of one chip, through its memory
        return Route(bytes_per_s=topology.facts.bandwidth_bytes_per_s or math.inf, hops=1)
    # Cores that are in other groups send through the chip's links at the same time.
    sharing = topology.devices_per_chip / cores
    hops = max(size / count for size, count in zip(sizes, links, strict=True) if count)
    return Route(bytes_per_s=link * sum(links) / sharing, hops=hops)


@functools.lru_cache(maxsize=256)
def _laid(topology: Topology, mesh: MeshConfig) -> dict[str, tuple[int, ...]]:
    return axes_on_torus(topology, mesh)


def _hosts(axes: Axes, mesh: MeshConfig, topology: Topology) -> Route | None:
    """Hosts of devices behind a fast switch; between hosts each device has its share of a network.

    The devices of a group that are on one host bring in its data from others together.
    """
    joined = topology.interconnect
    inside, room = 1, topology.devices_per_host
    for axis in reversed(AXES):
        here = math.gcd(getattr(mesh, axis), room)
        room //= here
        inside *= here if axis in axes else 1
    group = mesh.shards(axes)
    speed = joined.link_bytes_per_s
    if group > inside and speed is not None:
        network = joined.network_bytes_per_s
        speed = None if network is None else min(speed, inside * network)
    if speed is None:
        return None
    return Route(bytes_per_s=speed, hops=math.log2(group))
