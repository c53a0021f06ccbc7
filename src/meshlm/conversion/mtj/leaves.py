"""The order of a mesh-transformer-jax checkpoint: which leaf lies where in a shard's files.

A checkpoint is `step_N/shard_{i}/{0..15}.npz`: the leaves of the tree of one shard without names,
in the order in which JAX walks it. Dicts are walked by key, as strings, so `layer_10` comes before
`layer_2`, and `b` before `w`. `table.py` says what each leaf is.

Source: mesh-transformer-jax, checkpoint.py:16-129.
"""

import dataclasses
import functools

from meshlm.conversion.layout import Layout, Shape
from meshlm.conversion.mtj.table import GPT_J
from meshlm.conversion.parts import PartKey, native_shapes
from meshlm.conversion.sidecar import ADAM_COUNT, SCHEDULE_COUNT, STEP
from meshlm.conversion.source import Group
from meshlm.conversion.table import Row
from meshlm.core.errors import BadInputError
from meshlm.model.config import ModelConfig

FILES_PER_SHARD = 16
OPTIMIZER_COUNTS = {ADAM_COUNT: "adam", SCHEDULE_COUNT: "schedule"}
"""The name of each in `Source.counts`."""
MOMENTS: tuple[Group, ...] = ("mu", "nu")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of each shard: what it holds, and its number in the shard."""

    group: Group
    key: PartKey
    row: Row
    shape: Shape
    """Of the native tensor."""
    number: int

    @property
    def path(self) -> str:
        """Module and name in the tree of a shard, after the group: `mu/layer_3/linear_4/w`."""
        outside = self.row.outside
        return outside if self.group == "params" else f"{self.group}/{outside}"

    @property
    def layout(self) -> Layout:
        """The layout of the shards."""
        moments = None if self.group == "params" else self.row.moments
        return moments or self.row.layout


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Every leaf of a shard in order."""

    groups: tuple[Group, ...]
    """In the order of the file."""
    tensors: tuple[Leaf, ...]
    counters: dict[str, int]
    """The leaves that count steps, by name: their number in a shard."""

    @functools.cached_property
    def by_part(self) -> dict[tuple[Group, PartKey], dict[str, Leaf]]:
        """The leaves of each group and part by native name."""
        found: dict[tuple[Group, PartKey], dict[str, Leaf]] = {}
        for leaf in self.tensors:
            found.setdefault((leaf.group, leaf.key), {})[leaf.row.native] = leaf
        return found

    def __len__(self) -> int:
        """Returns the number of arrays of one shard."""
        return len(self.tensors) + len(self.counters)


def file_order(num_layers: int) -> list[PartKey]:
    """Returns the parts in the order of the file: layers sorted as strings."""
    return ["embedding", *sorted(range(num_layers), key=str), "head"]


def make_leaves(model: ModelConfig, full: bool) -> Leaves:
    """Returns the leaves of a slim checkpoint, or of one with the optimizer's state."""
    tensors: list[Leaf] = []
    counters: dict[str, int] = {}

    def count(name: str) -> None:
        counters[name] = len(tensors) + len(counters)

    def add(group: Group) -> None:
        for key in file_order(model.num_layers):
            shapes = native_shapes(model, key)
            for name, row in GPT_J.rows(key).items():
                number = len(tensors) + len(counters)
                tensors.append(Leaf(group, key, row, shapes[name], number))

    if full:
        count(ADAM_COUNT)
        for group in MOMENTS:
            add(group)
        count(SCHEDULE_COUNT)
    add("params")
    count(STEP)
    return Leaves((*MOMENTS, "params") if full else ("params",), tuple(tensors), counters)


def find_leaves(model: ModelConfig, num_leaves: int, where: str) -> Leaves:
    """Returns the leaves of the checkpoint that has so many in a shard.

    Raises:
        BadInputError: neither kind of checkpoint has.
    """
    # Counted before anything is made: the config may name any number of layers.
    params = GPT_J.count(model.num_layers)
    slim, full = params + 1, (1 + len(MOMENTS)) * params + 1 + len(OPTIMIZER_COUNTS)
    if num_leaves in (slim, full):
        leaves = make_leaves(model, num_leaves == full)
        assert len(leaves) == num_leaves
        return leaves
    raise BadInputError(
        f"{where} has {num_leaves} arrays; with {model.num_layers} layers, as the config says, a "
        f"slim checkpoint has {slim} a shard and a full one {full}: give the fitting --config"
    )


def files_of(num_leaves: int) -> list[tuple[int, int]]:
    """Returns (file, place in it) of every leaf of a shard."""
    many, longer = divmod(num_leaves, FILES_PER_SHARD)
    sizes = [many + (file < longer) for file in range(FILES_PER_SHARD)]
    return [(file, place) for file, size in enumerate(sizes) for place in range(size)]
