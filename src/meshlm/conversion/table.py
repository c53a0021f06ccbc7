"""Tables: the name and the layout that each native tensor of a family has in a file format.

A family of models has one table in each foreign format. Reading and writing both go by it, and what
it does not say comes from the model's description: shapes, and the order of the native tensors.
To add a family, write its table beside that of GPT-J (`hf/gptj.py`, `mtj/table.py`). A row has one
native name today: fused matrices of query, key and value will need several.
"""

import dataclasses
from collections.abc import Mapping

from meshlm.conversion.layout import Layout, Shape
from meshlm.conversion.parts import PartKey, native_shapes, part_of
from meshlm.model.config import ModelConfig

_LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One native tensor. In the names of a layer's, `{layer}` stands for the number."""

    outside: str
    """Its name in the format."""
    native: str
    layout: Layout
    moments: Layout | None = None
    """The layout of Adam's moments of it, where that is another."""


class Table:
    """The rows of a family, in the order of the format."""

    def __init__(self, *rows: Row, added: Mapping[str, str] | None = None) -> None:
        """Args:
        added: `added[vector] = matrix` for each native vector that the format has no tensor for:
            writing adds it to every row of that matrix.
        """
        self.added: Mapping[str, str] = added or {}
        self._of_layers = tuple(row for row in rows if _LAYER in row.native)
        self._others = tuple(row for row in rows if _LAYER not in row.native)

    def rows(self, key: PartKey) -> dict[str, Row]:
        """Returns the rows of a part by native name, in the order of the format."""
        if not isinstance(key, int):
            return {row.native: row for row in self._others if part_of(row.native) == key}
        number = str(key)
        rows = (
            dataclasses.replace(
                row,
                outside=row.outside.replace(_LAYER, number),
                native=row.native.replace(_LAYER, number),
            )
            for row in self._of_layers
        )
        return {row.native: row for row in rows}

    def count(self, num_layers: int) -> int:
        """Returns the number of tensors that a model has in the format."""
        return len(self._others) + num_layers * len(self._of_layers)

    def shapes(self, model: ModelConfig, key: PartKey) -> list[tuple[Row, Shape]]:
        """Returns the rows of a part, each with the shape of its tensor in the format.

        They are in the order of the description, without what is added to another tensor. For a
        format that does not cut its tensors into shards.
        """
        rows = self.rows(key)
        return [
            (rows[name], rows[name].layout.array_shape(shape))
            for name, shape in native_shapes(model, key).items()
            if name not in self.added
        ]
