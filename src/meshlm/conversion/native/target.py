"""Writing a checkpoint of MeshLM's own, from which training can go on where moments are given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshlm.checkpoint import ArrayInfo, LayerWriter
from meshlm.conversion.cast import cast
from meshlm.conversion.native.source import (
    ADAM_COUNT,
    CONFIG_FILE,
    PREFIXES,
    SPECIAL_TOKENS_KEY,
    TOKENIZER_FILE,
)
from meshlm.conversion.parts import PartKey, part_keys, stacked_name
from meshlm.conversion.sidecar import SIDECAR_FILE, Sidecar
from meshlm.conversion.source import Group, Part
from meshlm.conversion.target import Target
from meshlm.core.config import to_dict, to_json
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.formats.tensor import TensorInfo
from meshlm.model.config import ModelConfig
from meshlm.model.params import weight_table

# What a TrainState has beside parameters and moments.
_COUNTERS = ("step", ADAM_COUNT, "skipped", "skipped_in_a_row")


class NativeTarget(Target):
    """A checkpoint of MeshLM's being written, a layer's tensor at a time."""

    kind = "meshlm"

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
        special_tokens: SpecialTokens | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        special_tokens: None for those of the tokenizer.
        facts: what config.json is to say of the source, as JSON values.
        """
        self._special_tokens = special_tokens or SpecialTokens.of(tokenizer)
        self.model, self.notes = model, []
        self._tokenizer, self._step, self._sidecar = tokenizer, step, sidecar
        self.group_order = groups
        self._facts = {**(facts or {}), "step": step}
        found: dict[str, set[np.dtype]] = {}
        for name, info in infos.items():
            found.setdefault(stacked_name(name)[0], set()).add(info.dtype)
        trains = len(groups) > 1
        self._dtypes = {name: self._choose(name, dtypes) for name, dtypes in found.items()}
        shapes = {name: weight.shape for name, weight in weight_table(model).items()}
        arrays = {
            PREFIXES[group] + name: ArrayInfo(shape=shape, dtype=self._dtype(group, name).name)
            for group in groups
            for name, shape in shapes.items()
        }
        self._counters: dict[str, int] = {}
        if trains:
            adam = counts.get("adam", step or 0)
            self._counters = dict.fromkeys(_COUNTERS, 0) | {"step": step or 0, ADAM_COUNT: adam}
        arrays |= {name: ArrayInfo(shape=(), dtype="int32") for name in self._counters}
        self._writer = LayerWriter(folder, arrays)

    @property
    def order(self) -> Sequence[PartKey]:
        return part_keys(self.model)

    def write(self, group: Group, part: Part) -> None:
        for name in part.tensors:
            stacked, layer = stacked_name(name)
            value = cast(part.read(name), self._dtype(group, stacked), name)
            self._writer.write(PREFIXES[group] + stacked, value, layer)
            del value

    def finish(self) -> None:
        for name, value in self._counters.items():
            self._writer.write(name, np.asarray(value, np.int32))
        config = {"model": to_dict(self.model), "source": self._facts}
        if self._special_tokens != SpecialTokens.of(self._tokenizer):
            config[SPECIAL_TOKENS_KEY] = to_dict(self._special_tokens)
        files = {CONFIG_FILE: to_json(config)}
        if self._tokenizer is not None:
            files[TOKENIZER_FILE] = self._tokenizer.to_json()
        if self._sidecar is not None:
            files[SIDECAR_FILE] = self._sidecar.to_bytes()
        self._writer.seal(self._step or 0, files)

    def _dtype(self, group: Group, name: str) -> np.dtype:
        return self._dtypes[name] if group == "params" else np.dtype(np.float32)

    def _choose(self, name: str, found: set[np.dtype]) -> np.dtype:
        """Returns the dtype of an array: that of its layers."""
        if len(found) > 1:
            self.notes.append(f"{name}: its layers differ in type; stored as float32")
            return np.dtype(np.float32)
        return next(iter(found))
