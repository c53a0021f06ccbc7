"""What the formats have in common: a model comes in parts, and a part's tensors one at a time.

A part is the embedding, one layer, or the head with the final norm. Every tensor has its native
name and shape (`parts.py`). Beside these a part has its raw tensors: as its files have them, under
the names that its format uses; the certificate computes from them.

Nothing here holds more than one tensor: `read` gives an array, which the caller drops before it
reads the next one.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from meshlm.conversion.finite import Place, check_finite
from meshlm.conversion.parts import PartKey
from meshlm.conversion.sidecar import Sidecar
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.formats.tensor import TensorInfo
from meshlm.model.config import ModelConfig

Kind = Literal["meshlm", "hf", "mtj"]
Group = Literal["params", "mu", "nu"]
"""The weights, and Adam's two moments of each of them."""


class Part(abc.ABC):
    """The embedding, one layer, or the head with the final norm."""

    key: PartKey
    tensors: Mapping[str, TensorInfo]
    """By native name, in the order of `native_names`."""
    raw: Sequence[str]
    """Names in the format's own terms, as the certificate lists them."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in its native layout and stored dtype; treat it as read-only."""

    def read_finite(self, name: str) -> np.ndarray:
        """Returns what `read` does.

        Raises:
            BadInputError: it holds NaN or infinities; the tensor, their number and the first are
                named.
        """
        array = self.read(name)
        check_finite(array, self.place(name))
        return array

    def place(self, name: str) -> Place:
        """Returns where a tensor lies, by its native name."""
        return Place(name, self.tensors[name].shape)

    @abc.abstractmethod
    def read_raw(self, name: str) -> np.ndarray:
        """Returns a tensor as its file has it, shape and dtype; treat it as read-only."""


class Source(abc.ABC):
    """Weights in one of the formats, opened and checked: names, shapes and dtypes are known."""

    kind: Kind
    path: Path
    model: ModelConfig
    tokenizer: Tokenizer | None
    groups: tuple[Group, ...]
    """("params",), or all three where the optimizer's state is there."""
    special_tokens: SpecialTokens
    """As the files declare them; of files that declare nothing, those of the tokenizer."""
    left_out: Sequence[str] = ()
    """Lines for a person: what lies beside the weights that no other format has a place for."""
    step: int | None
    """Steps of training behind the weights, where the format says so."""
    counts: Mapping[str, int]
    """What the optimizer has counted, where its state is there: `adam`, the updates of the moments,
    and `schedule`, the step of the learning rate. Neither need be `step`."""
    shards: int | None
    """Shares in which the summed biases were trained: the original's shards. None where nothing
    says so."""
    sidecar: Sidecar | None
    """What the native tree has no place for, of weights that came from the original's format."""

    @abc.abstractmethod
    def parts(
        self, group: Group = "params", order: Sequence[PartKey] | None = None
    ) -> Iterator[Part]:
        """Yields every part once, in `order` or as the forward pass needs them.

        A part may be used until the next one is asked for.
        """

    @property
    @abc.abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """All native tensors of "params"; those of the moments have the same names and shapes."""
