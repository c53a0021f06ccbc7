"""What the formats have in common: a model comes in parts, and a part's tensors one at a time.

A part is the embedding, one layer, or the head with the final norm. Every tensor has a native name,
the one of `model.params.Params` with the layer's number in it (`blocks.3.query`), and the native
shape, without the leading dim of layers. Beside these a part has its raw tensors: as its files have
them, under the names that its format uses; the certificate computes from them.

Nothing here holds more than one tensor: `read` gives an array, which the caller drops before it
reads the next one.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from meshlm.conversion.finite import Place, check_finite, is_finite
from meshlm.conversion.sidecar import Sidecar
from meshlm.core.errors import BadInputError
from meshlm.core.tree import to_named
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.formats.tensor import TensorInfo, row_blocks
from meshlm.model.config import ModelConfig
from meshlm.model.params import describe

Kind = Literal["meshlm", "hf", "mtj"]
Group = Literal["params", "mu", "nu"]
"""The weights, and Adam's two moments of each of them."""
PartKey = int | Literal["embedding", "head"]


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


class Target(abc.ABC):
    """A folder being written in one of the formats."""

    kind: Kind
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


class CastPart(Part):
    """Another part's tensors in one dtype."""

    def __init__(self, part: Part, dtype: np.dtype) -> None:
        self._part, self._dtype = part, dtype
        self.key, self.raw = part.key, part.raw
        self.tensors = {
            name: dataclasses.replace(info, dtype=dtype) for name, info in part.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return cast(self._part.read(name), self._dtype, name)

    def place(self, name: str) -> Place:
        return self._part.place(name)

    def read_raw(self, name: str) -> np.ndarray:
        return self._part.read_raw(name)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns the array in `dtype`.

    Raises:
        BadInputError: a finite number is too large for it.
    """
    if array.dtype == dtype:
        return array
    result = np.empty(array.shape, dtype)
    narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max
    for rows in row_blocks(array.shape):
        with np.errstate(over="ignore"):
            result[rows] = array[rows]
        if not narrower or is_finite(result[rows]):
            continue
        if (np.isinf(result[rows]) & ~np.isinf(array[rows])).any():
            raise BadInputError(
                f"{name} has numbers too large for {dtype.name}: choose another --dtype"
            )
    return result
