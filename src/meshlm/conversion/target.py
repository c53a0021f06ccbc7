"""What every format has to do to be written: take a model's parts one after the other."""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

from meshlm.conversion.parts import PartKey
from meshlm.conversion.source import Group, Kind, Part
from meshlm.model.config import ModelConfig


class Target(abc.ABC):
    """A folder being written in one of the formats."""

    kind: Kind
    added: ClassVar[Mapping[str, str]] = {}
    """The native vectors that the format has no tensor for, each by the native matrix to whose rows
    it is added."""
    model: ModelConfig
    """The shape as it reads back: without an embedding bias where the format has none."""
    group_order: Sequence[Group]
    """The groups that are written, in the order in which `write` must be given them."""
    notes: list[str]
    """Lines for a person: what was folded, dropped or widened."""

    @property
    @abc.abstractmethod
    def order(self) -> Sequence[PartKey]:
        """The order in which `write` must be given the parts."""

    @abc.abstractmethod
    def write(self, group: Group, part: Part) -> None:
        """Writes a part; reads each of its tensors exactly once. The groups come in turn."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Writes what comes after the tensors. The folder is complete when this returns."""

    def close(self) -> None:
        """Closes the files that are still open, also those of a folder that is given up."""
        return
