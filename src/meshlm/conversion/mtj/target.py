"""Weights written as the original's checkpoint: shards of unnamed leaves, for any shard count."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meshlm.conversion.mtj import layout as mtj_layout
from meshlm.conversion.mtj.config import config_of_model
from meshlm.conversion.mtj.finding import META_NAME
from meshlm.conversion.mtj.layout import STEP, Slot
from meshlm.conversion.mtj.source import summed
from meshlm.conversion.mtj.tokens import write_kept_tokens
from meshlm.conversion.sidecar import Sidecar
from meshlm.conversion.source import Group, Part, PartKey
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
        mtj_layout.check_model(model, "choose --to meshlm or hf")
        mtj_layout.check_shards(model, shards)
        self.model = with_embedding_bias(model)
        self._tokens = (tokenizer, special_tokens or SpecialTokens.of(tokenizer))
        self.notes: list[str] = []
        self._layout = mtj_layout.make_layout(model.num_layers, full=len(groups) > 1)
        self.group_order = self._layout.groups
        self._folder, self._shards, self._step = folder, shards, step or 0
        matrices = {info.dtype for info in infos.values() if len(info.shape) > 1}
        self._dtype = matrices.pop() if len(matrices) == 1 else _FLOAT32
        self._counts = {STEP: self._step} | {
            name: counts.get(short, self._step)
            for name, short in mtj_layout.OPTIMIZER_COUNTS.items()
        }
        self._sidecar = self._usable(sidecar)
        self._changed: list[str] = []
        self._slots = iter(self._layout.slots)
        self._writer = _ShardsWriter(folder / f"step_{self._step}", shards, self._layout.num_leaves)

    @property
    def order(self) -> Sequence[PartKey]:
        return mtj_layout.file_order(self.model.num_layers)

    def write(self, group: Group, part: Part) -> None:
        for _ in mtj_layout.leaves_of(part.key):
            slot = next(self._slots)
            assert (slot.group, slot.key) == (group, part.key), (slot, group, part.key)
            self._write_counters_until(slot.number)
            self._writer.add(self._leaves(slot, part))

    def finish(self) -> None:
        self._write_counters_until(self._layout.num_leaves)
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

    def _leaves(self, slot: Slot, part: Part) -> Sequence[np.ndarray]:
        """Returns every shard's leaf."""
        leaf = slot.leaf
        if leaf.name not in part.tensors:
            # A model without a bias of the embedding has the same numbers with one of zeros.
            zeros = np.zeros(self.model.d_model, self._dtype_of_bias(slot))
            return [zeros] * self._shards
        array = part.read(leaf.name)
        if leaf.how in ("sum", "first"):
            return self._kept(slot, array) or self._made(slot, array)
        flat = array.reshape(mtj_layout.flat_shape(leaf, array.shape, self._shards))
        return [mtj_layout.shard_of(leaf, flat, s, self._shards) for s in range(self._shards)]

    def _kept(self, slot: Slot, array: np.ndarray) -> Sequence[np.ndarray] | None:
        """Returns the sidecar's values, if they are still what makes this tensor."""
        if self._sidecar is None:
            return None
        name = f"{slot.group}.{slot.leaf.name}"
        kept = self._sidecar.arrays.get(name)
        if kept is not None and kept.shape == (self._shards, *array.shape):
            is_sum = slot.leaf.how == "sum" and slot.group == "params"
            was = summed(kept) if is_sum else kept[0]
            dtypes = (array.dtype, self._dtype) if is_sum else (array.dtype,)
            if kept.dtype in dtypes and _same(was, array):
                return list(kept)
        self._changed.append(name)
        return None

    def _made(self, slot: Slot, array: np.ndarray) -> Sequence[np.ndarray]:
        if slot.leaf.how == "sum":
            if slot.group != "params":
                return [array] * self._shards
            return make_shares(array, self._shards, self._dtype)
        # The original trains the first shard's norm alone; the others stay as they began.
        fill = 1 if slot.group == "params" and slot.leaf.path.endswith("scale") else 0
        return [array] + [np.full_like(array, fill)] * (self._shards - 1)

    def _dtype_of_bias(self, slot: Slot) -> np.dtype:
        return self._dtype if slot.group == "params" else _FLOAT32

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
        for name, place in self._layout.counters.items():
            if self._writer.count == place < number:
                self._writer.add(self._counters(name))

    def _counters(self, name: str) -> Sequence[np.ndarray]:
        """Returns a count for every shard: the shards' own where they still say the same."""
        count = self._counts[name]
        kept = None if self._sidecar is None else self._sidecar.arrays.get(name)
        if kept is not None and int(kept[0]) == count:
            return list(kept)
        return [np.array(count, np.int32)] * self._shards


def make_shares(total: np.ndarray, shards: int, dtype: np.dtype) -> Sequence[np.ndarray]:
    """Returns shares of a bias whose sum is the bias, in `dtype` or, where that cannot be, wider.

    They are equal if that is exact, as the original's training leaves them. Else the first shard
    has all of it, or what fits into the dtype, and the next ones what is left.
    """
    if shards == 1:
        return [total]
    wide = total.astype(np.float64)
    equal = (wide / shards).astype(dtype)
    if shards & (shards - 1) == 0 and _same(equal.astype(np.float64) * shards, wide):
        return [equal] * shards
    shares: list[np.ndarray] = []
    for _ in range(shards):
        with np.errstate(over="ignore", invalid="ignore"):
            shares.append(wide.astype(dtype))
            wide = wide - shares[-1].astype(np.float64)
    if _same(summed(np.stack(shares)), total.astype(_FLOAT32)):
        return shares
    return [total, *[np.zeros_like(total)] * (shards - 1)]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Tells whether two arrays are the same bit for bit."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


class _ShardsWriter:
    """The shards' files, written side by side leaf by leaf."""

    def __init__(self, step_folder: Path, shards: int, num_leaves: int) -> None:
        self.count = 0
        self._folders = [step_folder / f"shard_{shard}" for shard in range(shards)]
        for folder in self._folders:
            folder.mkdir(parents=True)
        self._places = mtj_layout.files_of(num_leaves)
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
