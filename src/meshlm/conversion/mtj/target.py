"""Weights written as the original's checkpoint: shards of unnamed leaves, for any shard count."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meshlm.conversion.mtj.config import check_model, check_shards, config_of_model
from meshlm.conversion.mtj.finding import META_NAME
from meshlm.conversion.mtj.leaves import (
    OPTIMIZER_COUNTS,
    Leaf,
    file_order,
    files_of,
    make_leaves,
)
from meshlm.conversion.mtj.shares import is_same
from meshlm.conversion.mtj.tokens import write_kept_tokens
from meshlm.conversion.parts import PartKey
from meshlm.conversion.sidecar import STEP, Sidecar
from meshlm.conversion.source import Group, Part
from meshlm.conversion.target import Target
from meshlm.core import files
from meshlm.core.config import to_json
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.formats.npz_writer import NpzWriter
from meshlm.formats.tensor import TensorInfo
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias

_FLOAT32 = np.dtype(np.float32)


class MtjTarget(Target):
    """A folder in which `step_N`, `meta.json` and `config.json` are written."""

    kind = "mtj"

    def __init__(
        self,
        folder: Path,
        *,
        model: ModelConfig,
        infos: Mapping[str, TensorInfo],
        groups: Sequence[Group],
        tokenizer: Tokenizer | None,
        step: int | None,
        counts: Mapping[str, int],
        sidecar: Sidecar | None,
        shards: int,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        """Args: infos: tensors of "params" as they will be given. shards: folders to write.

        The original's format has no tokenizer: its code has GPT-2's. Another one, and special
        tokens (None: those of the tokenizer), lie beside the checkpoint.

        Raises:
            UsageError: the model has a shape that the original's code cannot have, or heads or
                vocabulary cannot be cut into so many shards.
        """
        check_model(model, "choose --to meshlm or hf")
        check_shards(model, shards)
        self.model = with_embedding_bias(model)
        self._tokens = (tokenizer, special_tokens or SpecialTokens.of(tokenizer))
        self.notes: list[str] = []
        self._leaves = make_leaves(self.model, full=len(groups) > 1)
        self.group_order = self._leaves.groups
        self._folder, self._shards, self._step = folder, shards, step or 0
        matrices = {info.dtype for info in infos.values() if len(info.shape) > 1}
        self._dtype = matrices.pop() if len(matrices) == 1 else _FLOAT32
        self._counts = {STEP: self._step} | {
            name: counts.get(short, self._step) for name, short in OPTIMIZER_COUNTS.items()
        }
        self._sidecar = self._usable(sidecar)
        self._changed: list[str] = []
        self._writer = _ShardsWriter(folder / f"step_{self._step}", shards, len(self._leaves))

    @property
    def order(self) -> Sequence[PartKey]:
        return file_order(self.model.num_layers)

    def write(self, group: Group, part: Part) -> None:
        for leaf in self._leaves.by_part[group, part.key].values():
            self._write_counters_until(leaf.number)
            assert self._writer.count == leaf.number, leaf
            self._writer.add(self._arrays(leaf, part))

    def finish(self) -> None:
        self._write_counters_until(len(self._leaves))
        self._writer.close()
        meta = {"step": self._step, "checkpoints": [self._step], "aux": {}}
        files.write_new(self._folder / META_NAME, to_json(meta))
        config = config_of_model(self.model, self._shards)
        files.write_new(self._folder / "config.json", to_json(config))
        self.notes += write_kept_tokens(self._folder, *self._tokens, self.model)
        if self._changed:
            first, others = self._changed[0], len(self._changed) - 1
            more = f" and {others} other tensors have" if others else " has"
            self.notes.append(f"sidecar dropped where {first}{more} changed since")

    def close(self) -> None:
        self._writer.close()

    def _arrays(self, leaf: Leaf, part: Part) -> Sequence[np.ndarray]:
        """Returns the leaf of every shard."""
        if leaf.row.native not in part.tensors:
            # A model without a bias of the embedding has the same numbers with one of zeros.
            dtype = self._dtype if leaf.group == "params" else _FLOAT32
            return [np.zeros(leaf.shape, dtype)] * self._shards
        array = part.read(leaf.row.native)
        kept = self._kept(leaf, array) if leaf.layout.has_more else None
        return kept or leaf.layout.split(array, self._shards, self._dtype)

    def _kept(self, leaf: Leaf, array: np.ndarray) -> Sequence[np.ndarray] | None:
        """Returns the sidecar's values, if they are still what makes this tensor."""
        if self._sidecar is None:
            return None
        name = f"{leaf.group}.{leaf.row.native}"
        kept = self._sidecar.arrays.get(name)
        if (
            kept is not None
            and kept.shape == (self._shards, *array.shape)
            and kept.dtype in (array.dtype, self._dtype)
            and is_same(leaf.layout.native(kept), array)
        ):
            return list(kept)
        self._changed.append(name)
        return None

    def _usable(self, sidecar: Sidecar | None) -> Sidecar | None:
        if sidecar is None:
            return None
        if sidecar.shards != self._shards:
            self.notes.append(
                f"sidecar dropped: it is of {sidecar.shards} shards, not of {self._shards}"
            )
            return None
        return sidecar

    def _write_counters_until(self, number: int) -> None:
        for name, place in self._leaves.counters.items():
            if self._writer.count == place < number:
                self._writer.add(self._counters(name))

    def _counters(self, name: str) -> Sequence[np.ndarray]:
        """Returns a count for every shard: the shards' own where they still say the same."""
        count = self._counts[name]
        kept = None if self._sidecar is None else self._sidecar.arrays.get(name)
        if kept is not None and int(kept[0]) == count:
            return list(kept)
        return [np.array(count, np.int32)] * self._shards


class _ShardsWriter:
    """The shards' files, written side by side leaf by leaf."""

    def __init__(self, step_folder: Path, shards: int, num_leaves: int) -> None:
        self.count = 0
        self._folders = [step_folder / f"shard_{shard}" for shard in range(shards)]
        for folder in self._folders:
            folder.mkdir(parents=True)
        self._places = files_of(num_leaves)
        self._file = -1
        self._writers: list[NpzWriter] = []

    def add(self, leaves: Sequence[np.ndarray | np.generic]) -> None:
        """Writes the next leaf of every shard."""
        file = self._places[self.count][0]
        if file != self._file:
            self.close()
            self._file = file
            self._writers = [NpzWriter(folder / f"{file}.npz") for folder in self._folders]
        for writer, leaf in zip(self._writers, leaves, strict=True):
            writer.add(np.asarray(leaf))
        self.count += 1

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []
