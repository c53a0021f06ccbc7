"""How arrays are split: the mesh's axes, the one table of rules, and the specs made from it.

An *axis* is a mesh axis, a *dim* a tensor dimension. Every mesh has the same three axes, of size 1
where they are not used, so that one program text serves a laptop and a pod:

    replica   whole copies of the weights (several slices); gradients are summed over it once a step
    data      the batch, and the weights' shards (FSDP): gathered for use, one layer at a time
    model     tensor parallelism: heads, feed-forward width, vocabulary

The sharding is explicit (`jax.sharding.AxisType.Explicit`): a spec is part of an array's type, and
a mistake is an error when the function is traced, with or without devices.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshlm.core.errors import UsageError

AXES = ("replica", "data", "model")

# The one rule table: logical dim -> mesh axes that split it. Dims that are not named stay whole.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("replica", "data"),
    # weights as stored
    "embed": ("data",),
    "heads": ("model",),
    "ff": ("model",),
    "vocab": ("model",),
    # The table is split by embedding dim alone. A lookup then is local and costs one all-gather of
    # activations over `model`; split by vocabulary too it would be rematerialised whole.
    "table_embed": ("model", "data"),
}
# Axes over which a weight is gathered just before it is used.
GATHERED = ("data",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The sizes of the mesh's axes; their product is the number of devices used."""

    replica: int = 1
    """Whole copies of the weights; the batch is split among them."""
    data: int = 1
    """Devices that split the batch and hold the weights in shards (FSDP)."""
    model: int = 1
    """Devices that split every layer: heads, feed-forward width and vocabulary."""

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UsageError(
                    f"--mesh.{axis} is {getattr(self, axis)}: give 1 or more (1 means unused)"
                )

    @property
    def num_devices(self) -> int:
        """The number of devices in the mesh."""
        return self.replica * self.data * self.model

    @property
    def batch_shards(self) -> int:
        """The number of parts into which the batch is split."""
        return self.replica * self.data


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """Returns a mesh of explicit axes over `devices` (the machine's, unless given).

    Raises:
        UsageError: the mesh wants another number of devices than there are.
    """
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else devices
    shape = tuple(getattr(config, axis) for axis in AXES)
    if config.num_devices > len(devices):
        sizes = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise UsageError(
            f"the mesh {sizes} wants {config.num_devices} devices and {len(devices)} are here: "
            f"lower --mesh.*, or on a CPU make virtual ones with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.num_devices}"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[: config.num_devices]
    )


def partition(*dims: str | None, sizes: Mapping[str, int], gathered: bool = False) -> PartitionSpec:
    """Returns the spec of an array with these logical dims, from the rule table.

    An axis of size 1 splits nothing and is left out, so that on one device every spec is empty.

    Args:
        dims: one name a tensor dimension; None and names without a rule stay whole.
        sizes: of the mesh's axes.
        gathered: leave out the axes over which weights are gathered for use; `batch` stays.

    Raises:
        ValueError: two dims claim the same mesh axis.
    """
    parts: list[Any] = []
    used: dict[str, str] = {}
    for dim in dims:
        dropped = GATHERED if gathered and dim != "batch" else ()
        axes = tuple(a for a in (RULES.get(dim, ()) if dim else ()) if a not in dropped)
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"dims {used[axis]!r} and {dim!r} are both split over mesh axis {axis!r}"
                )
            used[axis] = dim or ""
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        parts.append(axes[0] if len(axes) == 1 else (axes or None))
    return PartitionSpec(*parts)


def is_split(*axes: str) -> bool:
    """True where the mesh that is entered has one of these axes (any, if none is named) above 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in axes or AXES)


def spec(*dims: str | None, gathered: bool = False) -> PartitionSpec | None:
    """Returns `partition(...)` on the mesh that is entered, or None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return partition(*dims, sizes=mesh.shape, gathered=gathered)


def reshard(x: jax.Array, *dims: str | None, gathered: bool = False) -> jax.Array:
    """Returns `x` split as its logical dims say; outside of a mesh, `x` itself."""
    target = spec(*dims, gathered=gathered)
    return x if target is None else jax.sharding.reshard(x, target)


def sharding_of(mesh: jax.sharding.Mesh, *dims: str | None) -> NamedSharding:
    """Returns the sharding on `mesh` of an array with these logical dims."""
    return NamedSharding(mesh, partition(*dims, sizes=mesh.shape))
