"""How arrays are split: the mesh's axes, the one table of rules, and the specs made from it.

An *axis* is a mesh axis, a *dim* a tensor dimension. Every mesh has the same three axes, of size 1
where they are not used, so that one program text serves a laptop and a pod. What they mean by
default (`fsdp-tensor`; the others are in the table below):

    replica   whole copies of the weights (several slices); gradients are summed over it once a step
    data      the batch, and the weights' shards (FSDP): gathered for use, one layer at a time
    model     tensor parallelism: heads, feed-forward width, vocabulary

The sharding is explicit (`jax.sharding.AxisType.Explicit`): a spec is part of an array's type, and
a mistake is an error when the function is traced, with or without devices.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshlm.core.errors import UsageError
from meshlm.core.placement import place_devices, slice_of

AXES = ("replica", "data", "model")
Axes = tuple[str, ...]
ShardingName = Literal["data", "fsdp", "fsdp-tensor", "tensor", "replica-fsdp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Which mesh axes split each logical dim. Dims that are not named here stay whole."""

    name: ShardingName
    batch: Axes
    """Rows of the batch, in activations."""
    embed: Axes = ()
    """The width of the residual stream, in weights: gathered just before a weight is used."""
    heads: Axes = ()
    ff: Axes = ()
    vocab: Axes = ()
    table_embed: Axes = ()
    """The embedding table is split by its width alone. A lookup then is local and costs at most one
    all-gather of activations over `model`; split by vocabulary too it would be rematerialised."""

    def axes(self, dim: str | None) -> Axes:
        """Returns the axes that split a logical dim."""
        return getattr(self, dim) if dim in _LOGICAL_DIMS else ()


_LOGICAL_DIMS = tuple(f.name for f in dataclasses.fields(Rules) if f.name != "name")
_ALL = AXES
_TENSOR: dict[str, Axes] = dict.fromkeys(("heads", "ff", "vocab"), ("model",))

# The one table; model/params.py says which dims a weight has. `gathered` weights are whole for use,
# so the axes of `embed` may be the batch's.
RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        Rules(name="data", batch=_ALL),
        Rules(name="fsdp", batch=_ALL, embed=_ALL, table_embed=_ALL),
        Rules(
            name="fsdp-tensor",
            batch=("replica", "data"),
            embed=("data",),
            table_embed=("model", "data"),
            **_TENSOR,
        ),
        Rules(name="tensor", batch=("replica", "data"), table_embed=("model",), **_TENSOR),
        Rules(
            name="replica-fsdp",
            batch=_ALL,
            embed=("data", "model"),
            table_embed=("data", "model"),
        ),
    )
}
DEFAULT_RULES = RULES["fsdp-tensor"]
# Part of what a compiled function is remembered by.
_rules = jax.make_user_context(DEFAULT_RULES)
_platform = jax.make_user_context("")
_left_out = jax.make_user_context(frozenset())


def current_rules() -> Rules:
    """Returns the rules that `use_mesh` has entered."""
    return _rules.value


def target_platform() -> str:
    """Returns the platform that is computed or compiled for: the entered mesh's, or JAX's own."""
    return _platform.value or jax.default_backend()


def use_rules(rules: Rules) -> contextlib.AbstractContextManager[Any]:
    """Enters rules, for what is asked of them before there is a mesh."""
    return _rules(rules)


@contextlib.contextmanager
def use_mesh(mesh: jax.sharding.Mesh, rules: Rules | None = None) -> Iterator[None]:
    """Enters a mesh and the rules by which arrays are split over it.

    Args:
        mesh: of devices that are here, or that are only compiled for.
        rules: None keeps those that are entered (`fsdp-tensor`, if none were).
    """
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh), use_rules(rules or current_rules()), _platform(platform):
        yield


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

    def shards(self, axes: Axes) -> int:
        """Returns the number of parts into which these axes split a dim."""
        return math.prod(getattr(self, axis) for axis in axes)


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
    placed = place_devices(shape, devices[: config.num_devices])
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)


def whole_mesh(name: ShardingName, devices: Sequence[Any]) -> MeshConfig:
    """Returns the mesh of all these devices that rules are meant for (`mesh_of_all`)."""
    return mesh_of_all(name, len(devices), len({slice_of(device) for device in devices}))


def mesh_of_all(name: ShardingName, count: int, slices: int = 1) -> MeshConfig:
    """Returns the mesh of so many devices that rules are meant for.

    Whole copies take the axis `replica`, tensor parallelism `model` and everything else `data`
    within each slice (devices with fast links among themselves), and `replica` the slices.
    """
    if name == "data":
        return MeshConfig(replica=count)
    within = "model" if name == "tensor" else "data"
    return MeshConfig(replica=slices, **{within: count // slices})


def partition(*dims: str | None, sizes: Mapping[str, int], gathered: bool = False) -> PartitionSpec:
    """Returns the spec of an array with these logical dims, from the rules that are entered.

    An axis of size 1 splits nothing and is left out, so that on one device every spec is empty.

    Args:
        dims: one name a tensor dimension; None and names without a rule stay whole.
        sizes: of the mesh's axes.
        gathered: leave out the axes over which weights are gathered for use; `batch` stays.

    Raises:
        ValueError: two dims claim the same mesh axis.
    """
    rules = current_rules()
    parts: list[Any] = []
    used: dict[str, str] = {}
    for dim in dims:
        dropped = rules.embed if gathered and dim != "batch" else ()
        axes = tuple(axis for axis in rules.axes(dim) if axis not in dropped)
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"dims {used[axis]!r} and {dim!r} are both split over mesh axis {axis!r}"
                )
            used[axis] = dim or ""
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        parts.append(axes[0] if len(axes) == 1 else (axes or None))
    return PartitionSpec(*parts)


def is_split() -> bool:
    """True where the mesh that is entered has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def is_one_cpu() -> bool:
    """True where one CPU device is computed or compiled for."""
    return target_platform() == "cpu" and not is_split()


def axes_of(dim: str) -> frozenset[str]:
    """Returns the axes above 1 of the mesh that is entered that split a logical dim."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return frozenset()
    sizes = _sizes(mesh)
    return frozenset(axis for axis in current_rules().axes(dim) if sizes[axis] > 1)


def shards_of(dim: str) -> int:
    """Returns the number of parts into which the mesh that is entered splits a logical dim."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes_of(dim))


def share(x: jax.Array, dim: str) -> jax.Array:
    """Returns x for several uses with arrays that `dim` is split in, where x itself is whole.

    Their gradients are added up on each device first, and over the axes of `dim` once.
    """
    axes = axes_of(dim)
    if not axes:
        return x
    split = jax.typeof(x).sharding.spec.partitions
    return jax.sharding.reshard(x, PartitionSpec(*split, reduced=axes))


def copy_axes() -> Axes:
    """Returns the axes above 1 of the mesh that is entered over which rows are split and weights
    are whole: each device along them has a gradient of its own rows."""
    gathered = axes_of("embed")
    split = axes_of("batch") - gathered
    return tuple(axis for axis in current_rules().batch if axis in split)


def _sizes(mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
    """Returns the axes' sizes; one that is left out (`leave_out`) splits nothing."""
    return {axis: 1 if axis in _left_out.value else size for axis, size in mesh.shape.items()}


def leave_out(axes: Axes) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which these axes split no dim: `jax.vmap` runs over them."""
    return _left_out(frozenset(axes))


def spec(*dims: str | None, gathered: bool = False) -> PartitionSpec | None:
    """Returns `partition(...)` on the mesh that is entered, or None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return partition(*dims, sizes=_sizes(mesh), gathered=gathered)


def reshard(x: jax.Array, *dims: str | None, gathered: bool = False) -> jax.Array:
    """Returns `x` split as its logical dims say; outside of a mesh, `x` itself."""
    target = spec(*dims, gathered=gathered)
    return x if target is None else jax.sharding.reshard(x, target)


def gather_reduced(weight: jax.Array, *dims: str | None) -> jax.Array:
    """Returns a weight as products with rows take it: whole over the axes that it is stored over.

    Every device has a gradient of its own rows, in the weight's dtype. Their sum is made in that
    dtype too, as it is scattered over the shards; after `reshard` it is made in the products'.
    """
    target = spec(*dims, gathered=True)
    if target is None:
        return weight
    return jax.sharding.reshard(weight, PartitionSpec(*target, reduced=axes_of("batch")))


def sharding_of(mesh: jax.sharding.Mesh, *dims: str | None) -> NamedSharding:
    """Returns the sharding on `mesh` of an array with these logical dims."""
    return NamedSharding(mesh, partition(*dims, sizes=mesh.shape))
