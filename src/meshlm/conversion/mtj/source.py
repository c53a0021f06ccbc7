"""The original's checkpoints as a source of weights: a folder of a step, or a published archive.

The values of a shard never decide what an array is: its place does, and its shape must agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from meshlm.conversion.finite import Place
from meshlm.conversion.mtj import finding as mtj_finding
from meshlm.conversion.mtj.archive import Archive, ArchiveStore
from meshlm.conversion.mtj.config import check_model
from meshlm.conversion.mtj.leaves import (
    MOMENTS,
    OPTIMIZER_COUNTS,
    Leaf,
    Leaves,
    find_leaves,
)
from meshlm.conversion.mtj.store import FolderStore, Reader, Store, check_headers
from meshlm.conversion.mtj.tokens import KeptTokens, implied_tokenizer, read_kept_tokens
from meshlm.conversion.parts import PartKey, native_names, part_keys
from meshlm.conversion.sidecar import STEP, Sidecar
from meshlm.conversion.source import Group, Part, Source
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
        check_model(model, "give the fitting --config")
        if model.num_heads % store.shards or model.vocab_size % store.shards:
            raise UsageError(
                f"{model.num_heads} heads and {model.vocab_size} rows of vocabulary cannot be in "
                f"{store.shards} shards: is one missing?"
            )
        leaves = find_leaves(model, len(store.headers[0]), str(path))
        check_headers(store, leaves)
    except (BadInputError, UsageError) as error:
        raise BadInputError(f"{path} does not fit {where}: {error}") from None
    return MtjSource(path, store, leaves, model, kept)


class MtjSource(Source):
    """Weights of the original's, opened and checked."""

    kind = "mtj"

    def __init__(
        self,
        path: Path,
        store: Store,
        leaves: Leaves,
        model: ModelConfig,
        kept: KeptTokens,
    ) -> None:
        self.path, self.model = path, model
        self.tokenizer = kept.tokenizer or implied_tokenizer(model)
        self.special_tokens = kept.special_tokens or SpecialTokens.of(self.tokenizer)
        self._store, self._leaves = store, leaves.by_part
        full = len(leaves.groups) > 1
        self.groups = ("params", *MOMENTS) if full else ("params",)
        counts = {name: store.counter(number) for name, number in leaves.counters.items()}
        numbers = {name: _count(values, f"{path}: {name}") for name, values in counts.items()}
        self.step = numbers[STEP]
        self.counts = {
            short: numbers[name] for name, short in OPTIMIZER_COUNTS.items() if name in numbers
        }
        self.shards = store.shards
        of_shards = {
            f"{leaf.group}.{leaf.row.native}": store.joined(leaf)
            for leaf in leaves.tensors
            if leaf.layout.has_more
        }
        self.sidecar = Sidecar(shards=store.shards, arrays=counts | of_shards)
        self._infos = {
            name: info
            for key in part_keys(model)
            for name, info in self._part("params", key, store).tensors.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def parts(
        self, group: Group = "params", order: Sequence[PartKey] | None = None
    ) -> Iterator[Part]:
        keys = part_keys(self.model) if order is None else list(order)
        leaves = [list(self._leaves[group, key].values()) for key in keys]
        for at, key in enumerate(keys):
            reader = self._store.prepare(leaves[at:])
            yield self._part(group, key, reader)
            # Before the next is prepared: the caller may still have this part.
            reader.release()

    def _part(self, group: Group, key: PartKey, reader: Reader) -> "_MtjPart":
        leaves = self._leaves[group, key]
        in_order = {name: leaves[name] for name in native_names(self.model, key)}
        return _MtjPart(self.path, reader, self._store, key, in_order)


class _MtjPart(Part):
    def __init__(
        self, path: Path, reader: Reader, store: Store, key: PartKey, leaves: Mapping[str, Leaf]
    ) -> None:
        self.key, self._path = key, path
        self._reader, self._leaves = reader, leaves
        by_number = sorted(leaves.values(), key=lambda leaf: leaf.number)
        self._raw = {
            f"shard_{shard}/{leaf.path}": (leaf, shard)
            for shard in range(store.shards)
            for leaf in by_number
        }
        self.raw = list(self._raw)
        dtypes = {name: store.headers[0][leaf.number].dtype for name, leaf in leaves.items()}
        self.tensors = {
            name: TensorInfo(
                shape=leaf.shape, dtype=leaf.layout.native_dtype(dtypes[name], store.shards)
            )
            for name, leaf in leaves.items()
        }

    def read(self, name: str) -> np.ndarray:
        leaf = self._leaves[name]
        return leaf.layout.native(self._reader.joined(leaf))

    def place(self, name: str) -> Place:
        # An index into the joined and transposed array, which no file has.
        path = self._leaves[name].path
        return Place(f"{self._path}: {name} ({path} of its shards)", self.tensors[name].shape)

    def read_raw(self, name: str) -> np.ndarray:
        leaf, shard = self._raw[name]
        return self._reader.raw(leaf, shard)


def _count(values: np.ndarray, what: str) -> int:
    """Returns a count, of which every shard has a copy."""
    count = int(values[0])
    if not 0 <= count <= np.iinfo(np.int32).max:
        raise BadInputError(f"{what} is {count}: no run counts that far; fetch it again")
    return count
