"""A Hugging Face folder being written, which transformers loads as it is."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from meshlm.conversion.cast import cast
from meshlm.conversion.hf import gptj
from meshlm.conversion.hf.config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    id_settings,
    make_config,
)
from meshlm.conversion.hf.files import INDEX_SUFFIX, WEIGHTS_FILE
from meshlm.conversion.hf.tokenizer import write_json, write_tokenizer
from meshlm.conversion.parts import PartKey, part_keys
from meshlm.conversion.sidecar import Sidecar
from meshlm.conversion.source import Group, Part
from meshlm.conversion.target import Target
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.formats.safetensors import TensorWriter
from meshlm.formats.tensor import DTYPES, TensorInfo, row_blocks
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias

MAX_FILE_BYTES = 4_000_000_000
_METADATA = {"format": "pt"}  # transformers refuses a file without it
_FLOAT32 = DTYPES["float32"]


class HfTarget(Target):
    """config.json, the tokenizer, and safetensors of at most 4 GB each."""

    kind = "hf"
    added = gptj.TABLE.added

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
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Plans the files; nothing is written yet.

        The format has no place for the embedding bias, which is added to the embedding; nor for
        the optimizer's state, the step and the sidecar, which are left out.

        Args:
            infos: the dtype that each tensor is cast to, once.
            special_tokens: None for those of the tokenizer.

        Raises:
            UsageError: transformers' GPT-J cannot have this shape.
        """
        self._folder, self._tokenizer = folder, tokenizer
        self._special_tokens = special_tokens or SpecialTokens.of(tokenizer)
        make_config(model, "float32")  # raises before anything is written
        self.notes = []
        self.group_order: Sequence[Group] = ("params",)
        self.model = with_embedding_bias(model, False)
        dtypes = {name: info.dtype for name, info in infos.items()}
        matrices = {info.dtype for info in infos.values() if len(info.shape) > 1}
        self._common = _FLOAT32 if len(matrices) > 1 else matrices.pop()
        added = {bias: matrix for bias, matrix in self.added.items() if bias in infos}
        if len(set(dtypes.values())) > 1:
            dtypes |= dict.fromkeys(added.values(), _FLOAT32)
        self._say([dtypes[matrix] for matrix in added.values()], groups, sidecar)
        self._infos = {
            row.outside: TensorInfo(shape=shape, dtype=dtypes[row.native])
            for key in part_keys(model)
            for row, shape in gptj.TABLE.shapes(model, key)
        }
        self._files = self._plan(max_file_bytes)
        self._writers: dict[str, TensorWriter] = {}
        self._common_is_exact = True

    @property
    def order(self) -> Sequence[PartKey]:
        return part_keys(self.model)

    def write(self, group: Group, part: Part) -> None:
        if group != "params":
            return
        rows = gptj.TABLE.rows(part.key)
        # By the matrix to which each is added.
        biases = {self.added[name]: name for name in part.tensors if name in self.added}
        for name in part.tensors:
            if name in self.added:
                continue
            row = rows[name]
            dtype = self._infos[row.outside].dtype
            if name in biases:
                bias = part.read(biases[name])
                blocks = _add(part.read(name), bias, dtype, name)
            else:
                (array,) = row.layout.split(cast(part.read(name), dtype, name), 1, dtype)
                blocks = iter([array])
            self._write(row.outside, map(self._look_at, blocks))

    def finish(self) -> None:
        assert len(self._writers) == len(set(self._files.values()))
        assert all(writer.is_whole for writer in self._writers.values())
        if len(self._writers) > 1:
            sizes = [math.prod(i.shape) * i.dtype.itemsize for i in self._infos.values()]
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": self._files}
            write_json(self._folder / (WEIGHTS_FILE + INDEX_SUFFIX), index)
        # transformers loads in this dtype unless told otherwise: it must hold every number.
        dtype = self._common if self._common_is_exact else _FLOAT32
        special_tokens = self._special_tokens
        config = make_config(self.model, dtype.name, special_tokens)
        write_json(self._folder / CONFIG_FILE, config)
        write_json(self._folder / GENERATION_CONFIG_FILE, id_settings(special_tokens))
        if self._tokenizer is not None:
            self.notes += write_tokenizer(self._folder, self._tokenizer, special_tokens, self.model)

    def _say(
        self, summed: Iterable[np.dtype], groups: Sequence[Group], sidecar: Sidecar | None
    ) -> None:
        self.notes += [
            "the embedding bias is added to the embedding, as transformers' GPT-J has none: "
            f"summed in float32, stored as {dtype.name}"
            for dtype in summed
        ]
        if set(groups) != {"params"}:
            self.notes.append("the optimizer's state is left out: this format has no place for it")
        if sidecar is not None:
            self.notes.append("the values of each shard are left out: this format has the sum only")

    def _plan(self, max_file_bytes: int) -> dict[str, str]:
        """Returns the file of each tensor: as many in one, in order, as it may hold."""
        numbers, number, filled = {}, 1, 0
        for name, info in self._infos.items():
            size = math.prod(info.shape) * info.dtype.itemsize
            if filled and filled + size > max_file_bytes:
                number, filled = number + 1, 0
            numbers[name], filled = number, filled + size
        if number == 1:
            return dict.fromkeys(numbers, WEIGHTS_FILE)
        stem, suffix = WEIGHTS_FILE.split(".")
        return {name: f"{stem}-{i:05}-of-{number:05}.{suffix}" for name, i in numbers.items()}

    def _look_at(self, rows: np.ndarray) -> np.ndarray:
        self._common_is_exact = self._common_is_exact and _is_exact(rows, self._common)
        return rows

    def _write(self, name: str, rows: Iterable[np.ndarray]) -> None:
        file = self._files[name]
        writer = self._writers.get(file)
        if writer is None:
            infos = {n: self._infos[n] for n, own in self._files.items() if own == file}
            writer = self._writers[file] = TensorWriter(self._folder / file, infos, _METADATA)
        writer.write_rows(name, rows)
        if writer.is_whole:
            writer.finish()


def _add(
    table_VD: np.ndarray, bias_D: np.ndarray, dtype: np.dtype, name: str
) -> Iterator[np.ndarray]:
    """Yields the table with the bias in every row: summed in float32, then rounded once."""
    bias = bias_D.astype(np.float32)
    for rows in row_blocks(table_VD.shape):
        yield cast(table_VD[rows].astype(np.float32) + bias, dtype, name)


def _is_exact(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether `dtype` holds every number of the array."""
    if array.dtype == dtype or dtype == _FLOAT32:
        return True
    for rows in row_blocks(array.shape):
        block = array[rows]
        with np.errstate(over="ignore"):
            back = block.astype(dtype).astype(np.float32)
        if not np.array_equal(back, block.astype(np.float32)):
            return False
    return True
