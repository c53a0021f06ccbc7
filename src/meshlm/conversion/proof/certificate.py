"""What proves a conversion: every tensor's hash on both sides, and how far the numbers are apart.

The logits of fixed tokens are computed three times: by the reference forward from the tensors of
the source's files, by the same from those of the destination's, and by MeshLM's own forward.

Dim letters: T time, V vocabulary rows.
"""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshlm.conversion.cast import cast
from meshlm.conversion.source import Part, Source
from meshlm.core.config import to_dict, to_json
from meshlm.core.errors import MeshLMError
from meshlm.formats.tensor import TensorInfo, row_blocks
from meshlm.model.config import ModelConfig

CERTIFICATE_FILE = "certificate.json"
TOLERANCE = 2e-5
"""Of the largest |logit|: what float32 sums in another order come to, with room."""

_MAX_TOKENS = 32
_TENSOR_SUFFIXES = (".safetensors", ".npz")
_RECORDED_LIBRARIES = ("meshlm", "numpy", "jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Of its bytes, in C order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The source, or the destination."""

    path: str
    format: str
    step: int | None
    files: Mapping[str, int]
    """Bytes of each."""
    sha256: Mapping[str, str]
    """Of each file that holds no tensors; of the destination alone, and not of a checkpoint of
    MeshLM's, whose manifest has it."""
    tensors: Mapping[str, RawTensor]
    """In the format's own terms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two computations of the same logits are apart."""

    max_difference: float
    relative: float
    """The same, divided by the largest |logit|."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """The record of a conversion whose numbers hold."""

    source: Side
    destination: Side
    dtype: str | None
    """What all weights were cast to, if that was asked for."""
    is_lossy: bool
    """That cast, or the folding of the embedding's bias, rounded numbers."""
    same_tensors: int
    """Native tensors of the destination that are the source's (after the cast), bit for bit."""
    other_tensors: Mapping[str, str]
    """Why each of the rest is not."""
    metadata: Mapping[str, Any]
    """Of special tokens and tokenizer: what both sides declare alike."""
    tokens: Sequence[int]
    largest_logit: float
    distances: Mapping[str, Distance]
    tolerance: float
    versions: Mapping[str, str]
    date: str
    seconds: float
    notes: Sequence[str]

    def to_json(self) -> bytes:
        """Returns the bytes of certificate.json."""
        return to_json({"certificate": 1, **dataclasses.asdict(self)})

    def summary(self) -> list[str]:
        """Returns the result in a few lines for a person."""
        count = self.same_tensors + len(self.other_tensors)
        where = f" once cast to {self.dtype}" if self.dtype else ""
        lines = [f"{self.same_tensors} of {count} tensors are the source's bit for bit{where}"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.other_tensors.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{names[0]}{more}: {reason}")
        for pair, distance in self.distances.items():
            lines.append(f"{pair}: logits within {distance.relative:.1e} of the largest")
        return lines


def compare_metadata(source: Source, destination: Source) -> dict[str, Any]:
    """Returns what both sides declare of special tokens and tokenizer, as JSON values.

    Extra tokens at the end of the vocabulary count for nothing: a Hugging Face folder has them for
    the padding rows. Nor does there what a spelling becomes, which that format does not say.

    Raises:
        MeshLMError: the two differ.
    """
    wanted, found = _metadata(source), _metadata(destination)
    if destination.kind == "hf":
        del wanted["mode"]
    if source.tokenizer is None:
        del wanted["tokenizer"]
    for name, value in wanted.items():
        if found[name] != value:
            raise MeshLMError(
                f"the conversion changed {name}: {found[name]} was written, and the source has "
                f"{value}; nothing was kept"
            )
    return wanted


def _metadata(source: Source) -> dict[str, Any]:
    tokenizer = source.tokenizer
    plain = None if tokenizer is None else tokenizer.without_extra_tokens().fingerprint
    declared = to_dict(source.special_tokens)
    # As they come back from JSON.
    lists = {name: list(value) for name, value in declared.items() if isinstance(value, tuple)}
    return {**declared, **lists, "tokenizer": plain}


def probe_tokens(model: ModelConfig) -> list[int]:
    """Returns the fixed tokens on which both sides are computed."""
    return spread_tokens(model.vocab_size, min(_MAX_TOKENS, model.context_length))


def spread_tokens(vocab_size: int, length: int) -> list[int]:
    """Returns ids by a fixed rule that anyone can repeat, spread over the whole vocabulary."""
    # Knuth's multiplicative hash: over all rows, so over all shards, and the same for ever.
    hashes = [(place + 1) * 2_654_435_761 % 2**32 for place in range(length)]
    return [(number * vocab_size) >> 32 for number in hashes]


def versions() -> dict[str, str]:
    """Returns the versions of what computed."""
    found = {name: importlib.metadata.version(name) for name in _RECORDED_LIBRARIES}
    return {**found, "python": platform.python_version()}


def raw_tensors(part: Part) -> dict[str, RawTensor]:
    """Returns the record of each of a part's raw tensors."""
    records = {}
    for name in part.raw:
        array = part.read_raw(name)
        shape, dtype = array.shape, array.dtype.name
        records[name] = RawTensor(dtype=dtype, shape=shape, sha256=hash_tensor(array))
        del array
    return records


def hash_tensor(array: np.ndarray, dtype: np.dtype | None = None, name: str = "") -> str:
    """Returns the SHA-256 of a tensor's bytes in C order, cast to `dtype` on the way."""
    digest = hashlib.sha256()
    for rows in row_blocks(array.shape):
        block = array[rows] if dtype is None else cast(array[rows], dtype, name)
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def files_of(path: Path) -> dict[str, int]:
    """Returns the bytes of each file at a path."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name != CERTIFICATE_FILE)
    return {p.relative_to(path).as_posix(): p.stat().st_size for p in found}


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def side_of(
    source: Source, path: Path, tensors: Mapping[str, RawTensor], *, hash_files: bool = False
) -> Side:
    """Returns the record of one side, under the path that it is known by.

    Args:
        hash_files: hash the files that hold no tensors too.
    """
    files = files_of(source.path)
    beside = [name for name in files if not name.endswith(_TENSOR_SUFFIXES)] if hash_files else []
    return Side(
        path=str(path),
        format=source.kind,
        step=source.step,
        files=files,
        sha256={name: hash_file(source.path / name) for name in beside},
        tensors=tensors,
    )


def explain(
    name: str,
    source: Part,
    destination: Part,
    info: TensorInfo | None,
    added: Mapping[str, str],
) -> str | None:
    """Returns why a native tensor need not be the source's bit for bit; None if it should be.

    Args:
        source: the source's part, not cast.
        info: what the tensor was to be cast to; None where the source has none of it.
        added: `Target.added` of the destination's format.
    """
    there = destination.tensors.get(name)
    if info is None:
        is_zero = not destination.read(name).any()
        return "zeros: this format always has one" if is_zero else None
    if there is None:
        return "part of the embedding here" if name in added else None
    bias = None
    for vector, matrix in added.items():
        if matrix == name and vector in source.tensors:
            bias = source.read(vector).astype(np.float32)
    between = info.dtype if bias is None else np.dtype(np.float32)
    given, found = source.read(name), destination.read(name)
    for rows in row_blocks(given.shape):
        wanted = cast(given[rows], between, name)
        wanted = wanted if bias is None else cast(wanted + bias, there.dtype, name)
        if not np.array_equal(wanted.astype(np.float32), found[rows].astype(np.float32)):
            return None
    if bias is not None:
        return f"the embedding bias was added in float32, stored as {there.dtype.name}"
    if there.dtype != info.dtype:
        return f"the same numbers as {there.dtype.name}"
    return "the same numbers; zeros of another sign"


def measure(
    references: tuple[np.ndarray, np.ndarray], own: np.ndarray, *, is_lossy: bool
) -> dict[str, Distance]:
    """Returns how far the logits [T, V] are apart, pair by pair.

    Args:
        references: the reference's from the source's files, and from the destination's.
        own: MeshLM's, from the destination.
        is_lossy: the conversion rounded numbers, so that only the destination's need agree.

    Raises:
        MeshLMError: the logits differ by more than the tolerance.
    """
    source, destination = references
    rounding = " (the rounding)" if is_lossy else ""
    distances = {
        f"source and destination{rounding}": _distance(source, destination),
        "destination and MeshLM": _distance(destination, own),
        f"source and MeshLM{rounding}": _distance(source, own),
    }
    for pair, distance in distances.items():
        # Written so that it holds for NaN too.
        if not distance.relative <= TOLERANCE and not (is_lossy and pair.endswith(rounding)):
            raise MeshLMError(
                f"the converted weights do not give the same numbers: {pair} differ by "
                f"{distance.relative:.1e} of the largest logit, more than {TOLERANCE:.0e}"
            )
    return distances


def _distance(wanted: np.ndarray, found: np.ndarray) -> Distance:
    difference = float(np.abs(wanted.astype(np.float64) - found).max())
    largest = float(np.abs(wanted).max())
    relative = difference / largest if largest else (0.0 if difference == 0 else float("inf"))
    return Distance(max_difference=difference, relative=relative)
