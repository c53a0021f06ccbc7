"""The original's checkpoints as a source of weights: a folder of a step, or a published archive.

The values of a shard never decide what an array is: its place does, and its shape must agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from meshlm.conversion.finite import Place
from meshlm.conversion.mtj import finding as mtj_finding
from meshlm.conversion.mtj import layout as mtj_layout
from meshlm.conversion.mtj.archive import Archive, ArchiveStore
from meshlm.conversion.mtj.layout import STEP, Layout, Slot
from meshlm.conversion.mtj.store import FolderStore, Reader, Store, check_headers
from meshlm.conversion.mtj.tokens import KeptTokens, implied_tokenizer, read_kept_tokens
from meshlm.conversion.sidecar import Sidecar
from meshlm.conversion.source import Group, Part, PartKey, Source
from meshlm.conversion.table import native_names, part_keys
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.formats.tensor import TensorInfo
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias


def is_mtj(path: Path) -> bool:
    """Tells whether a path looks like a checkpoint of the original's, or like an archive of one."""
    if path.is_file():
        return mtj_finding.is_archive(path)
    if not path.is_dir():
        return False
    if mtj_finding.is_step_folder(path):
        return True
    steps = [p for p in path.glob("step_*") if mtj_finding.step_of_name(p.name) is not None]
    return any(mtj_finding.is_step_folder(step) for step in steps) or (
        mtj_finding.lists_steps(path)
    )


def open_mtj(
    path: Path, config: ModelConfig | None = None, tokenizer: Tokenizer | None = None
) -> Source:
    """Returns the weights of a step's folder, of the newest step in its parent, or of an archive.

    Args:
        config: the model; None: what the original's JSON config says that lies beside the weights.
        tokenizer: the weights' own; None: GPT-2's where the vocabulary has room for it.

    Raises:
        UsageError: nothing is at the path.
        BadInputError: the checkpoint is damaged, or the config does not fit it.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is nothing at this path")
    kept = None
    if path.is_dir():
        step_folder = mtj_finding.find_step(path)
        kept = read_kept_tokens(step_folder.parent)
        files = mtj_finding.config_files(step_folder, path)
        store: Store = FolderStore(step_folder)
    else:
        archive = Archive(path)
        files = [*archive.config_files, *mtj_finding.config_files(path.parent)]
        store = ArchiveStore(archive)
    if config is None:
        found = mtj_finding.choose_config(files, str(path))
        model, where = found.model, found.path
    else:
        model, where = config, "the config given"
    if tokenizer is not None or kept is None:
        kept = KeptTokens(tokenizer, None)
    return _make_source(path, store, model, where, kept)


def _make_source(
    path: Path, store: Store, model: ModelConfig, where: str, kept: KeptTokens
) -> Source:
    model = with_embedding_bias(model)
    try:
        mtj_layout.check_model(model, "give the fitting --config")
        if model.num_heads % store.shards or model.vocab_size % store.shards:
            raise UsageError(
                f"{model.num_heads} heads and {model.vocab_size} rows of vocabulary cannot be in "
                f"{store.shards} shards: is one missing?"
            )
        layout = mtj_layout.find_layout(model.num_layers, len(store.headers[0]), str(path))
        check_headers(store, layout, model)
    except (BadInputError, UsageError) as error:
        raise BadInputError(f"{path} does not fit {where}: {error}") from None
    return MtjSource(path, store, layout, model, kept)


class MtjSource(Source):
    """Weights of the original's, opened and checked."""

    kind = "mtj"

    def __init__(
        self,
        path: Path,
        store: Store,
        layout: Layout,
        model: ModelConfig,
        kept: KeptTokens,
    ) -> None:
        self.path, self.model = path, model
        self.tokenizer = kept.tokenizer or implied_tokenizer(model)
        self.special_tokens = kept.special_tokens or SpecialTokens.of(self.tokenizer)
        self._store, self._layout = store, layout
        self._slots: dict[tuple[Group, PartKey], dict[str, Slot]] = {}
        for slot in layout.slots:
            self._slots.setdefault((slot.group, slot.key), {})[slot.leaf.name] = slot
        full = len(layout.groups) > 1
        self.groups = ("params", *mtj_layout.MOMENTS) if full else ("params",)
        counts = {name: store.counter(number) for name, number in layout.counters.items()}
        numbers = {name: _count(values, f"{path}: {name}") for name, values in counts.items()}
        self.step = numbers[STEP]
        self.counts = {
            short: numbers[name]
            for name, short in mtj_layout.OPTIMIZER_COUNTS.items()
            if name in numbers
        }
        self.shards = store.shards
        self.sidecar = self._read_sidecar(counts)
        self._infos = {
            name: info
            for key in part_keys(model)
            for name, info in self._part("params", key, self._store).tensors.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def parts(
        self, group: Group = "params", order: Sequence[PartKey] | None = None
    ) -> Iterator[Part]:
        keys = part_keys(self.model) if order is None else list(order)
        for at, key in enumerate(keys):
            reader = self._store.prepare([self._flat_shapes(group, later) for later in keys[at:]])
            yield self._part(group, key, reader)
            # Before the next is prepared: the caller may still have this part.
            reader.release()

    def _part(self, group: Group, key: PartKey, reader: Reader) -> "_MtjPart":
        return _MtjPart(self.path, reader, self._store, self.model, key, self._slots[group, key])

    def _flat_shapes(self, group: Group, key: PartKey) -> dict[Slot, tuple[int, ...]]:
        slots = self._slots[group, key].values()
        return {slot: _flat_shape(self.model, slot, self._store.shards) for slot in slots}

    def _read_sidecar(self, counts: Mapping[str, np.ndarray]) -> Sidecar:
        arrays = dict(counts)
        for slot in self._layout.slots:
            if slot.leaf.how in ("sum", "first"):
                shape = _flat_shape(self.model, slot, self._store.shards)
                arrays[f"{slot.group}.{slot.leaf.name}"] = self._store.joined(slot, shape)
        return Sidecar(shards=self._store.shards, arrays=arrays)


class _MtjPart(Part):
    def __init__(
        self,
        path: Path,
        reader: Reader,
        store: Store,
        model: ModelConfig,
        key: PartKey,
        slots: Mapping[str, Slot],
    ) -> None:
        self.key, self._path = key, path
        self._reader, self._store, self._model, self._slots = reader, store, model, slots
        self._raw = {
            f"shard_{shard}/{slot.raw_path}": (slot, shard)
            for shard in range(store.shards)
            for slot in slots.values()
        }
        self.raw = list(self._raw)
        self.tensors = {
            name: TensorInfo(
                shape=mtj_layout.native_shape(model, slots[name]), dtype=self._dtype(slots[name])
            )
            for name in native_names(model, key)
        }

    def read(self, name: str) -> np.ndarray:
        slot = self._slots[name]
        flat = self._reader.joined(slot, _flat_shape(self._model, slot, self._store.shards))
        if slot.leaf.how == "first" or (slot.leaf.how == "sum" and slot.group != "params"):
            # The shards' biases get the same gradients, so their moments are those of the sum.
            return flat[0]
        if slot.leaf.how == "sum":
            return summed(flat)
        return flat.reshape(self.tensors[name].shape)

    def place(self, name: str) -> Place:
        # An index into the joined and transposed array, which no file has.
        raw = self._slots[name].raw_path
        return Place(f"{self._path}: {name} ({raw} of its shards)", self.tensors[name].shape)

    def read_raw(self, name: str) -> np.ndarray:
        slot, shard = self._raw[name]
        return self._reader.raw(slot, shard)

    def _dtype(self, slot: Slot) -> np.dtype:
        stored = self._store.headers[0][slot.number].dtype
        is_sum = slot.leaf.how == "sum" and slot.group == "params" and self._store.shards > 1
        return np.dtype(np.float32) if is_sum else stored


def _count(values: np.ndarray, what: str) -> int:
    """Returns a count, of which every shard has a copy."""
    count = int(values[0])
    if not 0 <= count <= np.iinfo(np.int32).max:
        raise BadInputError(f"{what} is {count}: no run counts that far; fetch it again")
    return count


def summed(shares: np.ndarray) -> np.ndarray:
    """Returns the sum of a bias's shares [S, n]: float32, or as stored where there is one."""
    if len(shares) == 1:
        return shares[0]
    with np.errstate(over="ignore", invalid="ignore"):
        return shares.astype(np.float64).sum(axis=0).astype(np.float32)


def _flat_shape(model: ModelConfig, slot: Slot, shards: int) -> tuple[int, ...]:
    return mtj_layout.flat_shape(slot.leaf, mtj_layout.native_shape(model, slot), shards)
