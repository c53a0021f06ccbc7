"""Converting weights from any format into any other, with proof: `convert`."""

import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshlm.checkpoint import add_file
from meshlm.conversion.cast import CastPart
from meshlm.conversion.destination import Destination
from meshlm.conversion.finite import Place
from meshlm.conversion.hf.target import HfTarget
from meshlm.conversion.mtj.source import open_mtj
from meshlm.conversion.mtj.target import MtjTarget
from meshlm.conversion.native.target import NativeTarget
from meshlm.conversion.opening import open_source
from meshlm.conversion.parts import PartKey, part_of
from meshlm.conversion.proof import certificate as certificates
from meshlm.conversion.proof.certificate import CERTIFICATE_FILE, Certificate, RawTensor
from meshlm.conversion.proof.record import find_record
from meshlm.conversion.proof.reference import ReferenceForward
from meshlm.conversion.proof.streamed import StreamedForward
from meshlm.conversion.source import Group, Kind, Part, Source
from meshlm.conversion.target import Target
from meshlm.core import files
from meshlm.core.errors import BadInputError, MeshLMError
from meshlm.formats.tensor import DTYPES, TensorInfo

OnProgress = Callable[[str, int, int], None]
"""Hears (stage, bytes done, bytes in all)."""

_FLOAT32 = DTYPES["float32"]


def convert(
    source: Source,
    destination: Path,
    *,
    to: Kind,
    shards: int = 8,
    dtype: str | None = None,
    force: bool = False,
    progress: OnProgress = lambda stage, done, total: None,
) -> Certificate:
    """Returns the certificate of the source's weights written in another format.

    What is written is opened again and held against the source, tensor by tensor and by its
    logits. Until all of that holds there is nothing under the destination's name.

    Args:
        to: the format.
        shards: of the original's format.
        dtype: of all weights; None keeps each as it is stored.
        force: replace weights that are there already.
        progress: hears how far the work is.

    Raises:
        UsageError: the destination is there already, the disk too small, or the format has no
            place for this shape or these shards.
        BadInputError: the source is damaged, or a number too large for `dtype`.
        MeshLMError: what was written does not give the source's numbers.
    """
    plan = _Plan.of(source, to, dtype)
    conversion = _Conversion(source, plan, destination, progress)
    with Destination(destination, source.path, plan.num_bytes, force=force) as folder:
        with contextlib.closing(_make_target(source, plan, folder, shards)) as target:
            conversion.write(target)
        # Not what lies above the folder: another config there is none of this one's.
        written = open_mtj(folder, target.model) if to == "mtj" else open_source(folder)
        result = conversion.check(written, [*source.left_out, *plan.notes, *target.notes])
        content = result.to_json()
        if to == "meshlm":
            add_file(folder, CERTIFICATE_FILE, content)
        else:
            files.write_new(folder / CERTIFICATE_FILE, content)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be written, before anything is."""

    to: Kind
    dtype: str | None
    infos: Mapping[str, TensorInfo]
    """What each tensor of "params" is cast to."""
    groups: tuple[Group, ...]
    is_lossy: bool
    notes: list[str]

    @classmethod
    def of(cls, source: Source, to: Kind, dtype: str | None) -> "_Plan":
        infos, groups, notes = dict(source.infos), source.groups, []
        if dtype is not None:
            infos = {n: dataclasses.replace(i, dtype=DTYPES[dtype]) for n, i in infos.items()}
        rounds = any(
            infos[name].dtype not in (_FLOAT32, info.dtype) for name, info in source.infos.items()
        )
        added = _TARGETS[to].added.keys() & infos.keys()
        if rounds and len(groups) > 1:
            groups = ("params",)
            notes.append(
                f"Adam's moments are left out: they belong to weights before --dtype {dtype}"
            )
        if dtype is None:
            # So the matrix that each is added to becomes float32, and nothing is rounded.
            infos |= {n: dataclasses.replace(infos[n], dtype=_FLOAT32) for n in added}
        is_lossy = rounds or (bool(added) and dtype not in (None, "float32"))
        return cls(to=to, dtype=dtype, infos=infos, groups=groups, is_lossy=is_lossy, notes=notes)

    @property
    def num_bytes(self) -> int:
        """What the destination takes on disk, nearly."""
        weights = sum(info.num_bytes for info in self.infos.values())
        moments = 4 * sum(math.prod(info.shape) for info in self.infos.values())
        return weights + (0 if self.to == "hf" else (len(self.groups) - 1) * moments)


class _Conversion:
    """The passes over the weights: one that writes, and two that check."""

    def __init__(
        self, source: Source, plan: _Plan, destination: Path, progress: OnProgress
    ) -> None:
        self._source, self._plan, self._destination = source, plan, destination
        self._progress, self._started_s = progress, time.monotonic()
        self._tokens = certificates.probe_tokens(source.model)
        self._raw: dict[str, RawTensor] = {}
        self._given: dict[tuple[Group, str], str] = {}
        self._stage = ("", 0, 0)

    def write(self, target: Target) -> None:
        """Writes all parts, and notes the hashes of what was read and of what was given.

        Raises:
            BadInputError: the source cannot be read, or is not as its own certificate says.
        """
        record = find_record(self._source)
        if record is not None:
            record.check_files()
        self._begin("writing", len(target.group_order))
        for group in target.group_order:
            for part in self._source.parts(group, target.order):
                infos = self._infos(group, part)
                given = _GivenPart(self._as_given(part, infos), infos)
                target.write(group, given)
                self._given |= {(group, name): sha for name, sha in given.hashes.items()}
                raw = certificates.raw_tensors(part)
                if record is not None:
                    record.check_tensors(raw, self._source.path)
                self._raw |= raw
                self._advance(part)
        target.finish()

    def check(self, written: Source, notes: Sequence[str]) -> Certificate:
        """Returns the certificate of what was written."""
        reference = ReferenceForward(self._source.model, self._source.kind, self._tokens)
        self._begin("computing the source", 1)
        for part in self._source.parts():
            reference.feed(part)
            self._advance(part)
        if not np.isfinite(reference.logits).all():
            raise BadInputError(
                f"{self._source.path}: its weights are finite, but their logits overflow float32, "
                "so they cannot be certified"
            )
        again = ReferenceForward(written.model, written.kind, self._tokens)
        own = StreamedForward(written.model, self._tokens)
        raw, found = self._read_back(written, again, own)
        others = self._others(written, found)
        metadata = certificates.compare_metadata(self._source, written)
        distances = certificates.measure(
            (reference.logits, again.logits), own.logits, is_lossy=self._plan.is_lossy
        )
        return Certificate(
            source=certificates.side_of(self._source, self._source.path, self._raw),
            destination=certificates.side_of(
                written, self._destination, raw, hash_files=written.kind != "meshlm"
            ),
            dtype=self._plan.dtype,
            is_lossy=self._plan.is_lossy,
            same_tensors=sum(self._given.get(key) == sha for key, sha in found.items()),
            other_tensors=others,
            metadata=metadata,
            tokens=self._tokens,
            largest_logit=float(np.abs(reference.logits).max()),
            distances=distances,
            tolerance=certificates.TOLERANCE,
            versions=certificates.versions(),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._started_s, 1),
            notes=list(notes),
        )

    def _infos(self, group: Group, part: Part) -> Mapping[str, TensorInfo]:
        return self._plan.infos if group == "params" else part.tensors

    def _as_given(self, part: Part, infos: Mapping[str, TensorInfo]) -> Part:
        """Returns the part in the dtype asked for; what folds the bias casts by itself, once."""
        if self._plan.dtype is None or self._plan.to == "hf" or infos is part.tensors:
            return part
        return CastPart(part, DTYPES[self._plan.dtype])

    def _read_back(
        self, written: Source, reference: ReferenceForward, own: StreamedForward
    ) -> tuple[dict[str, RawTensor], dict[tuple[Group, str], str]]:
        """Returns what was written: the records of its raw tensors, and its native hashes."""
        raw: dict[str, RawTensor] = {}
        found: dict[tuple[Group, str], str] = {}
        self._begin("checking", len(written.groups))
        for group in written.groups:
            for part in written.parts(group):
                raw |= certificates.raw_tensors(part)
                for name in part.tensors:
                    found[group, name] = certificates.hash_tensor(part.read(name))
                if group == "params":
                    reference.feed(part)
                    own.feed(part)
                self._advance(part)
        return raw, found

    def _others(self, written: Source, found: Mapping[tuple[Group, str], str]) -> dict[str, str]:
        """Returns why each tensor differs that may; raises MeshLMError for one that may not."""
        differing: dict[tuple[Group, PartKey], list[str]] = {}
        for group, name in found.keys() | self._given.keys():
            if found.get((group, name)) != self._given.get((group, name)):
                differing.setdefault((group, part_of(name)), []).append(name)
        reasons = {}
        for (group, key), names in sorted(differing.items(), key=str):
            here = next(iter(self._source.parts(group, [key])))
            there = next(iter(written.parts(group, [key])))
            for name in sorted(names):
                info = self._infos(group, here).get(name)
                added = _TARGETS[written.kind].added
                reason = certificates.explain(name, here, there, info, added)
                if reason is None:
                    raise MeshLMError(
                        f"the conversion changed {name} ({group}): what was written is not what "
                        "the source has; nothing was kept"
                    )
                reasons[name if group == "params" else f"{group}/{name}"] = reason
        return reasons

    def _begin(self, stage: str, num_groups: int) -> None:
        total = sum(info.num_bytes for info in self._source.infos.values()) * num_groups
        self._stage = (stage, 0, total)
        self._progress(*self._stage)

    def _advance(self, part: Part) -> None:
        stage, done, total = self._stage
        # The destination may be wider than the source, by which the work is reckoned.
        done = min(total, done + sum(info.num_bytes for info in part.tensors.values()))
        self._stage = (stage, done, total)
        self._progress(*self._stage)


class _GivenPart(Part):
    """A part that notes the hash of every tensor that is read from it, as it is to be stored."""

    def __init__(self, part: Part, infos: Mapping[str, TensorInfo]) -> None:
        self._part, self._infos = part, infos
        self.key, self.tensors, self.raw = part.key, part.tensors, part.raw
        self.hashes: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray:
        array = self._part.read_finite(name)
        self.hashes[name] = certificates.hash_tensor(array, self._infos[name].dtype, name)
        return array

    def place(self, name: str) -> Place:
        return self._part.place(name)

    def read_raw(self, name: str) -> np.ndarray:
        return self._part.read_raw(name)


_TARGETS: dict[Kind, type[Target]] = {"meshlm": NativeTarget, "hf": HfTarget, "mtj": MtjTarget}


def _make_target(source: Source, plan: _Plan, folder: Path, shards: int) -> Target:
    common: dict[str, Any] = {
        "model": source.model,
        "infos": plan.infos,
        "groups": plan.groups,
        "tokenizer": source.tokenizer,
        "special_tokens": source.special_tokens,
        "step": source.step,
        "counts": source.counts,
        "sidecar": source.sidecar,
    }
    if plan.to == "mtj":
        return MtjTarget(folder, shards=shards, **common)
    if plan.to == "hf":
        return HfTarget(folder, **common)
    casts = any(plan.infos[name] != info for name, info in source.infos.items())
    if casts and source.sidecar is not None:
        common["sidecar"] = None
        plan.notes.append("sidecar dropped: it is of the weights before --dtype")
    return NativeTarget(folder, facts={"format": source.kind, "path": str(source.path)}, **common)
