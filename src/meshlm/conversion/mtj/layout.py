"""The original's checkpoint: which leaf lies where, and how shards make a tensor.

A checkpoint is `step_N/shard_{i}/{0..15}.npz`: the leaves of the tree of one shard without names,
in the order in which JAX walks it. Dicts are walked by key, as strings, so `layer_10` comes before
`layer_2`, and `b` before `w`. Haiku's weights are [in, out], native ones [out, in].

Dim letters: S shards, V vocabulary rows, D model, F feed-forward.

Source: mesh-transformer-jax, checkpoint.py:16-129, layers.py, to_hf_weights.py:160-249.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from meshlm.conversion.source import Group, PartKey
from meshlm.conversion.table import native_shapes
from meshlm.core.errors import BadInputError, UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias

FILES_PER_SHARD = 16
STEP, ADAM_COUNT, SCHEDULE_COUNT = "step", "adam_count", "schedule_count"
OPTIMIZER_COUNTS = {ADAM_COUNT: "adam", SCHEDULE_COUNT: "schedule"}
"""The name of each in `Source.counts`."""
MOMENTS: tuple[Group, ...] = ("mu", "nu")

How = Literal["rows", "columns", "sum", "first"]
"""Shards are rows of the native matrix (or parts of a vector), or its columns, or they are summed,
or the first one counts."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of each shard."""

    path: str
    """Module and name, as the original's tree has it: `layer_3/linear_4/w`."""
    name: str
    """The native tensor that it is a part of."""
    how: How
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """A leaf's place: its group of leaves, and its number in a shard."""

    group: Group
    key: PartKey
    leaf: Leaf
    number: int

    @property
    def raw_path(self) -> str:
        """Returns the leaf's path with its group before it, without the shard."""
        return self.leaf.path if self.group == "params" else f"{self.group}/{self.leaf.path}"


_LAYER: tuple[tuple[str, str, How], ...] = (
    ("linear/w", "attention.query.weight", "rows"),
    ("linear_1/w", "attention.value.weight", "rows"),
    ("linear_2/w", "attention.key.weight", "rows"),
    ("linear_3/w", "attention.out.weight", "columns"),
    ("linear_4/b", "feed_forward.up.bias", "rows"),
    ("linear_4/w", "feed_forward.up.weight", "rows"),
    ("linear_5/b", "feed_forward.down.bias", "sum"),
    ("linear_5/w", "feed_forward.down.weight", "columns"),
    ("replicated_layer_norm/offset", "attention_norm.offset", "first"),
    ("replicated_layer_norm/scale", "attention_norm.scale", "first"),
)
_EMBEDDING = (
    Leaf("embedding_shard/linear/b", "embedding.bias", "sum"),
    Leaf("embedding_shard/linear/w", "embedding.tokens", "rows"),
)
_HEAD = (
    Leaf("projection_shard/linear/b", "head.bias", "rows"),
    Leaf("projection_shard/linear/w", "head.weight", "rows", transposed=True),
    Leaf("projection_shard/replicated_layer_norm/offset", "final_norm.offset", "first"),
    Leaf("projection_shard/replicated_layer_norm/scale", "final_norm.scale", "first"),
)


def leaves_of(key: PartKey) -> tuple[Leaf, ...]:
    """Returns the leaves of a part in the order of the file."""
    if key == "embedding":
        return _EMBEDDING
    if key == "head":
        return _HEAD
    return tuple(
        Leaf(f"layer_{key}/{path}", f"blocks.{key}.{field}", how, path.endswith("/w"))
        for path, field, how in _LAYER
    )


def file_order(num_layers: int) -> list[PartKey]:
    """Returns the parts in the order of the file: layers sorted as strings."""
    return ["embedding", *sorted(range(num_layers), key=str), "head"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Every leaf of a shard in order."""

    groups: tuple[Group, ...]
    """In the order of the file."""
    slots: tuple[Slot, ...]
    counters: dict[str, int]
    """The leaves that count steps, by name: their number in a shard."""

    @property
    def num_leaves(self) -> int:
        """Returns the arrays of one shard."""
        return len(self.slots) + len(self.counters)

    def paths(self) -> list[str]:
        """Returns what to call each leaf, by number."""
        names = {slot.number: slot.raw_path for slot in self.slots}
        names |= {number: name for name, number in self.counters.items()}
        return [names[number] for number in range(len(names))]


def make_layout(num_layers: int, full: bool) -> Layout:
    """Returns the layout of a slim checkpoint, or of one with the optimizer's state."""
    slots: list[Slot] = []
    counters: dict[str, int] = {}

    def count(name: str) -> None:
        counters[name] = len(slots) + len(counters)

    def add(group: Group) -> None:
        for key in file_order(num_layers):
            for leaf in leaves_of(key):
                slots.append(Slot(group, key, leaf, len(slots) + len(counters)))

    if full:
        count(ADAM_COUNT)
        for group in MOMENTS:
            add(group)
        count(SCHEDULE_COUNT)
    add("params")
    count(STEP)
    return Layout((*MOMENTS, "params") if full else ("params",), tuple(slots), counters)


def find_layout(num_layers: int, num_leaves: int, where: str) -> Layout:
    """Returns the layout that has so many leaves in a shard.

    Raises:
        BadInputError: neither kind of checkpoint has.
    """
    # Counted before anything is made: the config may name any number of layers.
    params = 10 * num_layers + 6
    slim, full = params + 1, 3 * params + 3
    if num_leaves in (slim, full):
        layout = make_layout(num_layers, num_leaves == full)
        assert layout.num_leaves == num_leaves
        return layout
    raise BadInputError(
        f"{where} has {num_leaves} arrays; with {num_layers} layers, as the config says, a slim "
        f"checkpoint has {slim} a shard and a full one {full}: give the fitting --config"
    )


def files_of(num_leaves: int) -> list[tuple[int, int]]:
    """Returns (file, place in it) of every leaf of a shard."""
    many, longer = divmod(num_leaves, FILES_PER_SHARD)
    sizes = [many + (file < longer) for file in range(FILES_PER_SHARD)]
    return [(file, place) for file, size in enumerate(sizes) for place in range(size)]


def native_shape(model: ModelConfig, slot: Slot) -> tuple[int, ...]:
    """Returns the shape of the native tensor that a leaf is a part of."""
    with_bias = with_embedding_bias(model)
    return native_shapes(with_bias, slot.key)[slot.leaf.name]


def flat_shape(leaf: Leaf, shape: Sequence[int], shards: int) -> tuple[int, ...]:
    """Returns the shape in which a tensor meets its shards.

    That is [out, in] for a matrix, and [S, n] for the vectors of which every shard has a whole one.
    """
    if leaf.how in ("sum", "first"):
        return (shards, *shape)
    if len(shape) == 1:
        return tuple(shape)
    # The heads' two dims are one: the last two of [D, N, H], the first two of [N, H, D].
    cut = 1 if leaf.how == "columns" else len(shape) - 1
    return (int(np.prod(shape[:cut])), int(np.prod(shape[cut:])))


def shard_of(leaf: Leaf, flat: np.ndarray, shard: int, shards: int) -> np.ndarray:
    """Returns the view of a tensor in its `flat_shape` that is one shard's leaf."""
    if leaf.how in ("sum", "first"):
        return flat[shard]
    axis = 1 if leaf.how == "columns" else 0
    size = flat.shape[axis] // shards
    part = slice(shard * size, (shard + 1) * size)
    view = flat[:, part] if axis else flat[part]
    return view.T if leaf.transposed else view


def leaf_shape(model: ModelConfig, slot: Slot, shards: int) -> tuple[int, ...]:
    """Returns the shape of a leaf in each shard."""
    shape = flat_shape(slot.leaf, native_shape(model, slot), shards)
    if slot.leaf.how in ("sum", "first"):
        return shape[1:]
    axis = 1 if slot.leaf.how == "columns" else 0
    sizes = [size // shards if i == axis else size for i, size in enumerate(shape)]
    return tuple(sizes[::-1] if slot.leaf.transposed else sizes)


def check_shards(model: ModelConfig, shards: int) -> None:
    """Raises UsageError where heads or vocabulary cannot be cut into so many shards."""
    for name, size in (("heads", model.num_heads), ("rows of vocabulary", model.vocab_size)):
        if shards < 1 or size % shards:
            common = np.gcd(model.num_heads, model.vocab_size)
            fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise UsageError(
                f"--shards {shards}: {size} {name} cannot be cut into so many; give one of "
                f"{', '.join(fitting)}"
            )


def check_model(model: ModelConfig, remedy: str) -> None:
    """Raises UsageError where the original's code could not have this shape."""
    fixed = {
        "d_ff": (model.d_ff, 4 * model.d_model),
        "num_heads x head_dim": (model.num_heads * model.head_dim, model.d_model),
        "layer_norm_epsilon": (model.layer_norm_epsilon, 1e-5),
        "rotary_base": (model.rotary_base, 10_000.0),
    }
    for name, (has, needs) in fixed.items():
        if has != needs:
            raise UsageError(
                f"the original's format has no place for {name} {has:g}: its code always has "
                f"{needs:g}; {remedy}"
            )
