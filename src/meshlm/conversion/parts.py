"""The native tensors of a model, by part: what the model's description says of each.

A native tensor has the name of its parameter, with the layer's number in it
(`blocks.3.attention.query.weight`), and the parameter's shape without the dim of layers.
"""

from typing import Literal

from meshlm.model.config import ModelConfig
from meshlm.model.params import Weight, layer_table, weight_table

PartKey = int | Literal["embedding", "head"]
"""The embedding, a layer by its number, or the head with the final norm."""
_BLOCKS = "blocks."
_EMBEDDING = "embedding."


def part_keys(model: ModelConfig) -> list[PartKey]:
    """Returns the parts in the order of the forward pass."""
    return ["embedding", *range(model.num_layers), "head"]


def part_of(name: str) -> PartKey:
    """Returns the part that has a native tensor."""
    _, layer = stacked_name(name)
    if layer is not None:
        return layer
    return "embedding" if name.startswith(_EMBEDDING) else "head"


def native_names(model: ModelConfig, key: PartKey) -> list[str]:
    """Returns the native names of a part's tensors, in the order of the description."""
    return list(native_shapes(model, key))


def native_shapes(model: ModelConfig, key: PartKey) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of a part's tensors by native name."""
    if isinstance(key, int):
        weights = layer_table(model).items()
        return {f"{_BLOCKS}{key}.{name}": weight.shape for name, weight in weights}
    return {
        name: weight.shape
        for name, weight in weight_table(model).items()
        if not name.startswith(_BLOCKS) and part_of(name) == key
    }


def weight_of(model: ModelConfig, name: str) -> Weight:
    """Returns the declaration of a native tensor; of one layer's, without the dim of layers."""
    stacked, layer = stacked_name(name)
    if layer is None:
        return weight_table(model)[stacked]
    return layer_table(model)[stacked.removeprefix(_BLOCKS)]


def stacked_name(name: str) -> tuple[str, int | None]:
    """Returns the parameter's name and the layer of a native tensor; no layer outside the blocks.

    `blocks.3.attention.query.weight` is layer 3 of `blocks.attention.query.weight`.
    """
    if not name.startswith(_BLOCKS):
        return name, None
    layer, _, field = name.removeprefix(_BLOCKS).partition(".")
    return f"{_BLOCKS}{field}", int(layer)
