"""MeshLM's own checkpoints as a source of weights: of a run, or converted from another format."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from meshlm import checkpoint
from meshlm.checkpoint import ArrayInfo, LayerReader
from meshlm.checkpoint.folder import steps_in
from meshlm.checkpoint.manifest import MANIFEST_NAME
from meshlm.conversion.finite import Place
from meshlm.conversion.parts import PartKey, native_shapes, part_keys, stacked_name
from meshlm.conversion.sidecar import SCHEDULE_COUNT, SIDECAR_FILE, Sidecar
from meshlm.conversion.source import Group, Part, Source
from meshlm.core import strict_json
from meshlm.core.config import from_dict
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import from_json
from meshlm.formats.tensor import DTYPES, TensorInfo
from meshlm.model.config import ModelConfig
from meshlm.model.families import model_from_record
from meshlm.model.params import weight_table

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS_FOLDER = "checkpoints"
SPECIAL_TOKENS_KEY = "special_tokens"

# Where a checkpoint has each group: the names of a TrainState.
PREFIXES: dict[Group, str] = {
    "params": "params.",
    "mu": "optimizer.adam.mu.",
    "nu": "optimizer.adam.nu.",
}
ADAM_COUNT = "optimizer.adam.count"
_MOMENTS: tuple[Group, ...] = ("mu", "nu")
_KIND_FOLDERS = (CHECKPOINTS_FOLDER, "arrays")


def is_native(path: Path) -> bool:
    """Whether this looks like a run, a folder of checkpoints, or one checkpoint."""
    if any((path / name).is_dir() for name in _KIND_FOLDERS):
        return True
    return any(
        (path / f"step_{step}" / name).exists()
        for step in steps_in(path)
        for name in ("arrays", MANIFEST_NAME)
    )


def open_native(path: Path) -> Source:
    """Returns the weights in a run's newest good checkpoint, or in the checkpoint at a path.

    All its bytes are read once, and checked.

    Raises:
        UsageError: there is no finished checkpoint.
        BadInputError: it is damaged, or its files do not fit each other.
    """
    folder, is_checked, reader = _open_checkpoint(path)
    damage = [] if is_checked else checkpoint.find_damage(folder)
    if damage:
        more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
        shown = ", ".join(map(str, damage[:3]))
        raise BadInputError(
            f"checkpoint {folder} is damaged: {shown}{more}; use another checkpoint"
        )
    return NativeSource(folder, reader, checkpoint.read_files(folder))


def _open_checkpoint(path: Path) -> tuple[Path, bool, LayerReader]:
    """Returns what `find_checkpoint` does, and its reader, which keeps retention from it."""
    while True:
        folder, is_checked = find_checkpoint(path)
        try:
            return folder, is_checked, LayerReader(folder)
        except (UsageError, OSError):
            # A run that trains has taken it away since it was found, and has a newer one.
            if folder == path or folder.exists():
                raise


def find_checkpoint(path: Path) -> tuple[Path, bool]:
    """Returns the checkpoint's folder, and whether all its bytes were checked to find it.

    Raises:
        UsageError: there is none.
        BadInputError: all that there are, are damaged.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is nothing at this path")
    if checkpoint.step_of(path) is not None or (path / "arrays").exists():
        return path, False
    folder = path / CHECKPOINTS_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path
    found = checkpoint.latest_good(folder) if folder.is_dir() else None
    if found is None:
        raise UsageError(f"{path} holds no finished checkpoint: give a run or a step_N folder")
    return found, True


def read_model(files: Mapping[str, bytes], where: str) -> ModelConfig:
    """Returns the model of a checkpoint from its small files: a run's, or a converted one's.

    Raises:
        BadInputError: config.json is not there, or tells of no model.
    """
    content = read_config(files, where)
    record = content.get("run", content)
    if not isinstance(record, dict) or "model" not in record:
        raise BadInputError(f"{where}/{CONFIG_FILE} tells of no model: use another checkpoint")
    try:
        return model_from_record(record["model"], f"{where}/{CONFIG_FILE}: model")
    except UsageError as error:
        raise BadInputError(f"{where}/{CONFIG_FILE}: {error}") from None


def read_special_tokens(files: Mapping[str, bytes], where: str) -> SpecialTokens | None:
    """Returns the special tokens that a checkpoint's config.json declares; None where it has none.

    Raises:
        BadInputError: they are damaged.
    """
    content = read_config(files, where)
    record = content.get("run", content)
    declared = record.get(SPECIAL_TOKENS_KEY) if isinstance(record, dict) else None
    if declared is None:
        return None
    return from_dict(SpecialTokens, declared, f"{where}/{CONFIG_FILE}: {SPECIAL_TOKENS_KEY}")


def read_config(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Returns the object in a checkpoint's config.json.

    Raises:
        BadInputError: there is none.
    """
    if CONFIG_FILE not in files:
        raise BadInputError(f"checkpoint {where} has no {CONFIG_FILE}: it is no model's")
    remedy = "use another checkpoint"
    return strict_json.parse_object(files[CONFIG_FILE], f"{where}/{CONFIG_FILE}", remedy=remedy)


class NativeSource(Source):
    """The weights of one checkpoint, whose files were checked."""

    kind = "meshlm"

    def __init__(self, path: Path, reader: LayerReader, files: Mapping[str, bytes]) -> None:
        """Raises: BadInputError where the files do not fit each other."""
        self.path = path
        self.model = read_model(files, str(path))
        self.tokenizer = self.sidecar = None
        declared = read_special_tokens(files, str(path))
        if TOKENIZER_FILE in files:
            eos_token = None if declared is None else declared.eos_token
            self.tokenizer = from_json(files[TOKENIZER_FILE], eos_token)
        self.special_tokens = declared or SpecialTokens.of(self.tokenizer)
        if SIDECAR_FILE in files:
            self.sidecar = Sidecar.from_bytes(files[SIDECAR_FILE], f"{path}/{SIDECAR_FILE}")
        converted = read_config(files, str(path)).get("source")
        has_step = not isinstance(converted, dict) or converted.get("step", 0) is not None
        self.step = reader.manifest.step if has_step else None
        self.shards = self._find_shards(files)
        self._reader = reader
        stored = reader.manifest.arrays
        has_moments = all(any(n.startswith(PREFIXES[g]) for n in stored) for g in _MOMENTS)
        self.groups: tuple[Group, ...] = ("params", *_MOMENTS) if has_moments else ("params",)
        self._infos = {group: _check(path, stored, self.model, group) for group in self.groups}
        self.counts = {}
        if ADAM_COUNT in stored:
            self.counts = {"adam": int(reader.read(ADAM_COUNT)), "schedule": self._schedule()}

    def _schedule(self) -> int:
        """Returns the step of the learning rate: here the step itself, in the original a count."""
        kept = {} if self.sidecar is None else self.sidecar.arrays
        return int(kept[SCHEDULE_COUNT][0]) if SCHEDULE_COUNT in kept else self.step or 0

    def _find_shards(self, files: Mapping[str, bytes]) -> int | None:
        """Returns the shards of the original that the weights came from, or whose recipe the run
        followed."""
        if self.sidecar is not None:
            return self.sidecar.shards
        run = read_config(files, str(self.path)).get("run")
        optimizer = run.get("optimizer") if isinstance(run, dict) else None
        shares = optimizer.get("bias_shares", 1) if isinstance(optimizer, dict) else 1
        return shares if isinstance(shares, int) and shares > 1 else None

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos["params"]

    def parts(
        self, group: Group = "params", order: Sequence[PartKey] | None = None
    ) -> Iterator[Part]:
        if group not in self.groups:
            raise UsageError(f"{self.path} has no optimizer state")
        for key in order or part_keys(self.model):
            yield _NativePart(self.path, self._reader, self.model, group, key, self._infos[group])


class _NativePart(Part):
    def __init__(
        self,
        path: Path,
        reader: LayerReader,
        model: ModelConfig,
        group: Group,
        key: PartKey,
        infos: Mapping[str, TensorInfo],
    ) -> None:
        self.key, self._path = key, path
        self._reader, self._prefix = reader, PREFIXES[group]
        self._folder = "" if group == "params" else f"{group}/"
        self.tensors = {name: infos[name] for name in native_shapes(model, key)}
        self.raw = [self._folder + name for name in self.tensors]

    def read(self, name: str) -> np.ndarray:
        stacked, layer = stacked_name(name)
        return self._reader.read(self._prefix + stacked, layer)

    def place(self, name: str) -> Place:
        stacked, layer = stacked_name(name)
        where = "" if layer is None else f", layer {layer}"
        array = f"array {self._prefix}{stacked}{where}"
        return Place(f"checkpoint {self._path}: {array}", self.tensors[name].shape)

    def read_raw(self, name: str) -> np.ndarray:
        return self.read(name.removeprefix(self._folder))


def _check(
    path: Path, stored: Mapping[str, ArrayInfo], model: ModelConfig, group: Group
) -> dict[str, TensorInfo]:
    """Returns the native tensors of a group; raises BadInputError unless they are the model's."""
    prefix = PREFIXES[group]
    wanted = {name: weight.shape for name, weight in weight_table(model).items()}
    unknown = [n for n in stored if n.startswith(prefix) and n.removeprefix(prefix) not in wanted]
    if unknown:
        raise BadInputError(f"checkpoint {path}: array {unknown[0]} is none of its model's")
    dtypes = {}
    for name, shape in wanted.items():
        info = stored.get(prefix + name)
        if info is None or info.shape != shape:
            raise BadInputError(
                f"checkpoint {path}: array {prefix}{name} is {info or 'absent'} in it, and "
                f"{list(shape)} by its {CONFIG_FILE}"
            )
        if info.dtype not in DTYPES:
            raise BadInputError(
                f"checkpoint {path}: array {prefix}{name} is {info.dtype}: weights are "
                f"{', '.join(DTYPES)} here"
            )
        dtypes[name] = jnp.dtype(info.dtype)
    return {
        name: TensorInfo(shape=shape, dtype=dtypes[stacked_name(name)[0]])
        for key in part_keys(model)
        for name, shape in native_shapes(model, key).items()
    }
