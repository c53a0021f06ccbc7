"""A run's folder read into one typed record, with whatever is missing or damaged left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.training.metrics import read_metrics, why_skipped
from meshlm.training.report.chart import Point

INCIDENTS_FILE = "incidents.jsonl"
SAMPLES_FOLDER = "samples"

Status = Literal["not started", "training", "finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that was not an ordinary step."""

    step: int
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text the model wrote at a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that the report says about a run."""

    name: str
    lines: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    samples: Sequence[Sample]
    incidents: Sequence[Incident]

    def points(self, key: str) -> list[Point]:
        """(step, value) of a metric where it was measured, by step; a step's last line counts."""
        by_step = {line["step"]: line[key] for line in self.lines if is_number(line.get(key))}
        return sorted((float(step), float(value)) for step, value in by_step.items())

    @property
    def last_step(self) -> int:
        """The last step with a line, 0 before the first."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def planned_steps(self) -> int | None:
        """The number of steps asked for, wherever the configuration says it."""
        found = [value for key, value in flatten(self.config) if key.split(".")[-1] == "steps"]
        return found[0] if found and isinstance(found[0], int) and found[0] > 0 else None

    @property
    def status(self) -> Status:
        """How the run stands, as far as its folder tells."""
        if self.planned_steps is not None and self.last_step >= self.planned_steps:
            return "finished"
        ends = [one for one in self.incidents if one.kind in ("stopped", "failed", "resumed")]
        if ends and ends[-1].kind != "resumed" and ends[-1].step >= self.last_step:
            return "stopped" if ends[-1].kind == "stopped" else "failed"
        return "training" if self.lines else "not started"

    @property
    def training_s(self) -> float:
        """Seconds spent in steps: each line's time per step, times the steps it stands for."""
        total, before = 0.0, 0.0
        for step, step_s in self.points("step_s"):
            total += step_s * (step - before)
            before = step
        return total


def is_number(value: object) -> bool:
    """Whether `value` is a finite number (and not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_record(folder: Path) -> Record:
    """The record of the run in `folder`."""
    lines = [line for line in read_metrics(folder) if _is_step(line.get("step"))]
    config = _read_json(folder / "config.json")
    incidents = [*_skipped_steps(lines), *_read_incidents(folder / INCIDENTS_FILE)]
    return Record(
        name=folder.resolve().name,
        lines=lines,
        config={key: value for key, value in config.items() if key != "environment"},
        environment=_as_mapping(config.get("environment")),
        samples=sorted(_read_samples(folder / SAMPLES_FOLDER), key=lambda one: one.step),
        incidents=sorted(incidents, key=lambda one: one.step),
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return strict_json.read_object(path)
    except (OSError, BadInputError, UsageError):
        return {}


def _read_samples(folder: Path) -> Iterator[Sample]:
    for path in folder.glob("*.json"):
        content = _read_json(path)
        samples = content.get("samples")
        if not _is_step(content.get("step")) or not isinstance(samples, list):
            continue
        for sample in map(_as_mapping, samples):
            prompt, text = sample.get("prompt"), sample.get("text")
            if isinstance(prompt, str) and isinstance(text, str):
                yield Sample(step=content["step"], prompt=prompt, text=text)


def _skipped_steps(lines: Sequence[Mapping[str, Any]]) -> Iterator[Incident]:
    for line in lines:
        count = line.get("skipped")
        if isinstance(count, int | float) and count > 0:
            steps = "the update was skipped" if count == 1 else f"{count:g} updates were skipped"
            message = f"{why_skipped(line)}, {steps}"
            yield Incident(step=line["step"], kind="skipped", message=message)


def _read_incidents(path: Path) -> Iterator[Incident]:
    try:
        lines = files.read(path).splitlines()
    except (OSError, UsageError):
        return
    for line in lines:
        try:
            values = strict_json.parse_object(line, INCIDENTS_FILE)
        except strict_json.JsonError:
            continue
        if _is_step(values.get("step")):
            kind, message = str(values.get("kind", "")), str(values.get("message", ""))
            yield Incident(step=values["step"], kind=kind, message=message)
