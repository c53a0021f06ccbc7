"""The native tensors of a model, by part."""

from meshlm.conversion.source import PartKey
from meshlm.model.config import ModelConfig
from meshlm.model.params import Weight, layer_table, weight_table


def native_names(model: ModelConfig, key: PartKey) -> list[str]:
    """Returns the native names of a part's tensors."""
    return list(native_shapes(model, key))


def native_shapes(model: ModelConfig, key: PartKey) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of a part's tensors by native name."""
    if isinstance(key, int):
        weights = layer_table(model).items()
        return {f"blocks.{key}.{name}": weight.shape for name, weight in weights}
    others = ("blocks.",) if key == "embedding" else ("blocks.", "embedding.")
    return {
        name: weight.shape
        for name, weight in weight_table(model).items()
        if not name.startswith(others) and (key == "head" or name.startswith("embedding."))
    }


def part_keys(model: ModelConfig) -> list[PartKey]:
    """Returns the parts in the order of the forward pass."""
    return ["embedding", *range(model.num_layers), "head"]


def weight_of(model: ModelConfig, name: str) -> Weight:
    """Returns the declaration of a native tensor; of one layer's, without the dim of layers."""
    stacked, layer = stacked_name(name)
    weight = weight_table(model)[stacked]
    return weight if layer is None else weight.of_layer


def stacked_name(name: str) -> tuple[str, int | None]:
    """Returns the name in `Params` and the layer, or (name, None) outside the layers.

    `blocks.3.attention.query.weight` is layer 3 of `blocks.attention.query.weight`.
    """
    room, _, rest = name.partition(".")
    if room != "blocks":
        return name, None
    layer, _, field = rest.partition(".")
    return f"blocks.{field}", int(layer)
