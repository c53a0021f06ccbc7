"""How fast devices along a mesh axis exchange: axes laid over a torus, or over hosts of GPUs."""

import dataclasses
import math

from meshlm.core.sharding import AXES, Axes, MeshConfig
from meshlm.planning.topology import Topology
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


@dataclasses.dataclass
class _Part:
    """A stretch of a torus dim, or the cores of a chip (links 0)."""

    size: int
    links: float
    """Into a chip: 2 where the ends are joined and the whole dim is taken, 1 on a line."""


def transfer_s(
    op: str, size: float, axes: Axes, mesh: MeshConfig, topology: Topology
) -> float | None:
    """Returns the seconds of one exchange over mesh axes; None where the links are not known."""
    group = mesh.shards(axes)
    if group <= 1:
        return 0.0
    route = find_route(axes, mesh, topology)
    if route is None:
        return None
    return wire_bytes(op, size, group) / route.bytes_per_s + route.hops * _HOP_S


def find_route(axes: Axes, mesh: MeshConfig, topology: Topology) -> Route | None:
    """Returns what joins the devices along `axes`; None where nothing is known of the links."""
    if topology.interconnect.link_bytes_per_s is None:
        return None
    return _torus(axes, mesh, topology) if topology.chips else _hosts(axes, mesh, topology)


def _torus(axes: Axes, mesh: MeshConfig, topology: Topology) -> Route:
    """`model` lies innermost, on a chip's own cores first, then `data`, then `replica`.

    A dim is left whole where an axis fits it, so that its ends stay joined.
    """
    link = topology.interconnect.link_bytes_per_s or 0.0
    cores = topology.devices_per_chip
    parts = _lay(mesh, topology)
    used = [part for axis in AXES if axis in axes for part in parts[axis]]
    links = sum(part.links for part in used)
    dims = [part for part in used if part.links]
    if not dims:  # the cores of one chip, through its memory
        return Route(bytes_per_s=topology.facts.bandwidth_bytes_per_s or math.inf, hops=1)
    # Cores that are in other groups send through the chip's links at the same time.
    sharing = 1 if any(not part.links for part in used) else cores
    hops = max(part.size / part.links for part in dims)
    return Route(bytes_per_s=link * links / sharing, hops=hops)


def _lay(mesh: MeshConfig, topology: Topology) -> dict[str, list[_Part]]:
    """Returns the parts of the torus that each mesh axis takes."""
    free = list(zip(topology.chips, topology.wraps, strict=True))
    cores = topology.devices_per_chip
    parts: dict[str, list[_Part]] = {}
    for axis in reversed(AXES):
        left, taken = getattr(mesh, axis), []
        if cores > 1 and left % cores == 0:
            taken.append(_Part(size=cores, links=0))
            left, cores = left // cores, 1
        while left > 1 and free:
            index = _next_dim(left, [size for size, _ in free])
            size, wraps = free.pop(index)
            share = math.gcd(left, size)
            if share == 1:
                break
            whole = share == size
            taken.append(_Part(size=share, links=2 if whole and wraps and size > 2 else 1))
            if not whole:
                free.append((size // share, False))
            left //= share
        parts[axis] = taken
    return parts


def _next_dim(left: int, sizes: list[int]) -> int:
    """Returns the dim to take: one that fits exactly, else the longest that divides, else any."""
    if left in sizes:
        return sizes.index(left)
    dividing = [size for size in sizes if left % size == 0]
    return sizes.index(max(dividing or sizes))


def _hosts(axes: Axes, mesh: MeshConfig, topology: Topology) -> Route:
    """Hosts of devices behind a fast switch; between hosts each device has its share of a network.

    The devices of a group that are on one host bring in its data from others together.
    """
    link, network = topology.interconnect.link_bytes_per_s, topology.interconnect
    inside, room = 1, topology.devices_per_host
    for axis in reversed(AXES):
        here = math.gcd(getattr(mesh, axis), room)
        room //= here
        inside *= here if axis in axes else 1
    group = mesh.shards(axes)
    speed = link or 0.0
    if group > inside:
        speed = min(speed, inside * (network.network_bytes_per_s or 0.0))
    return Route(bytes_per_s=speed, hops=math.log2(group))
