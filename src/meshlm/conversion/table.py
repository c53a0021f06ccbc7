"""The native tensors of a model, by part."""

from meshlm.conversion.source import PartKey
from meshlm.core.tree import to_named
from meshlm.model.config import ModelConfig
from meshlm.model.params import describe


def native_names(model: ModelConfig, key: PartKey) -> list[str]:
    """Returns the native names of a part's tensors."""
    return list(native_shapes(model, key))


def native_shapes(model: ModelConfig, key: PartKey) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of a part's tensors by native name."""
    weights = to_named(describe(model))
    if isinstance(key, int):
        prefix = "blocks."
        return {
            f"blocks.{key}.{name.removeprefix(prefix)}": weight.shape[1:]
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
    wanted = {"embedding": ("embedding", "embedding_bias")}.get(key)
    return {
        name: weight.shape
        for name, weight in weights.items()
        if not name.startswith("blocks.")
        and (name in wanted if wanted else not name.startswith("embedding"))
    }


def part_keys(model: ModelConfig) -> list[PartKey]:
    """Returns the parts in the order of the forward pass."""
    return ["embedding", *range(model.num_layers), "head"]


def stacked_name(name: str) -> tuple[str, int | None]:
    """Returns (`blocks.query`, 3) for `blocks.3.query`, and (name, None) outside the layers."""
    room, _, rest = name.partition(".")
    if room != "blocks":
        return name, None
    layer, _, field = rest.partition(".")
    return f"blocks.{field}", int(layer)
