"""What a run measures: the metrics file, TensorBoard beside it, and the arithmetic behind them.

`metrics.jsonl` is the truth: one JSON object a line, flushed at once, null and never NaN. Every
other view (TensorBoard, `report.html`) can be lost without losing the run's history.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]  (made at run time by protobuf)
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from meshlm.core import files, strict_json
from meshlm.core.errors import MeshLMError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Scalar = int | float | bool | str | None

_log = logging.getLogger(__name__)


class MetricsLog:
    """The metrics of one run, appended step by step. One process writes it.

    A line of step N speaks of the state after N updates. Resuming from step N keeps the lines up
    to N and drops what a killed process wrote beyond it; `resume_step=None` begins a new history
    and drops all of an earlier one.

    Raises:
        MeshLMError: metrics.jsonl itself cannot be written. (TensorBoard failing is a warning.)
    """

    def __init__(self, run_folder: str | Path, *, resume_step: int | None) -> None:
        self.path = Path(run_folder) / METRICS_FILE
        first_step = 0 if resume_step is None else resume_step + 1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.append(self.path).close()  # refuses what is no file before it is read
            _drop_lines_from(self.path, first_step)
            # Unbuffered, so that a failed write leaves nothing behind to fail again at close.
            self._file = files.append(self.path)
        except OSError as error:
            raise self._write_error(error) from error
        self._tensorboard = _TensorBoard(self.path.parent / TENSORBOARD_FOLDER, first_step)

    def write(self, step: int, **values: Any) -> None:
        """Append one line. Numpy and JAX scalars are accepted; NaN and infinities become null."""
        clean = {key: _to_json_scalar(key, value) for key, value in values.items()}
        line = json.dumps({"step": int(step), **clean}, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._write_error(error) from error
        self._tensorboard.write(int(step), clean)

    def close(self) -> None:
        """Flush and close both sinks."""
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write_error(self, error: OSError) -> MeshLMError:
        return MeshLMError(
            f"cannot write {self.path}: {error.strerror or error}; "
            "make room or give permission, then run the same command again"
        )


def read_metrics(run_folder: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl, in order; [] where there is no file.

    Lines that are no JSON object (the last one of a killed process, say) are passed over, so this
    is safe on a run that is being written.
    """
    path = Path(run_folder) / METRICS_FILE
    if not path.exists():
        return []
    parsed = (_parse_line(line) for line in files.read(path).split(b"\n"))
    return [values for values in parsed if values is not None]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on this line, or None where it is torn, blank or no object."""
    try:
        return strict_json.parse_object(line, METRICS_FILE, not_finite=lambda _: None)
    except strict_json.JsonError:
        return None


def why_skipped(line: Mapping[str, Any]) -> str:
    """Returns what a skipped step's line tells of the reason."""
    is_finite = line.get("loss") is not None and line.get("grad_norm") is not None
    return "the loss was a spike" if is_finite else "a loss or gradient was not finite"


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Rewrite the file without its torn lines and without lines of `first_step` and later.

    The new file replaces the old one whole, so a kill in the middle loses nothing. A file that
    needs no change is not touched.
    """
    if not path.exists():
        return
    before = files.read(path)
    kept = [line for line in before.split(b"\n") if _is_kept(line, first_step)]
    after = b"".join(line + b"\n" for line in kept)
    if after == before:
        return
    files.replace(path, after)
    dropped = sum(1 for line in before.split(b"\n") if line.strip()) - len(kept)
    _log.info("%s: dropped %d lines from step %d on", path, dropped, first_step)


def _is_kept(line: bytes, first_step: int) -> bool:
    values = _parse_line(line)
    if values is None:
        return False
    step = values.get("step")
    return not (isinstance(step, int) and step >= first_step)


def _to_json_scalar(key: str, value: Any) -> Scalar:
    if value is None or isinstance(value, bool | str):
        return value
    array = np.asarray(value)
    if array.ndim != 0:
        raise TypeError(f"metric {key} has shape {array.shape}; give one number")
    number = array.item()
    if isinstance(number, int):
        return number
    return float(number) if math.isfinite(number) else None


class _TensorBoard:
    """TensorBoard's event file. Whatever goes wrong here is one warning, and training goes on.

    tensorboardX's `SummaryWriter` hands events to a thread through a bounded queue; when that
    thread dies of a full disk, the queue fills and the training loop hangs. Its record writer,
    used here, raises instead.
    """

    flush_every_s = 5.0  # a flush is an fsync

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._writer: RecordWriter | None = None
        self._flushed_at_s = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names; a second may hold two runs.
            number = sum(1 for _ in folder.glob("events.*"))
            path = folder / f"events.out.tfevents.{int(time.time())}.{number:05d}"
            self._writer = _new_record_file(path)
            self._add(0, file_version="brain.Event:2")
            # Hides what earlier files hold of this step and later ones.
            self._add(first_step, session_log=SessionLog(status=SessionLog.START))
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, Scalar]) -> None:
        try:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._add(step, summary=scalar(_tensorboard_tag(key), value))
            if self._writer and time.monotonic() - self._flushed_at_s >= self.flush_every_s:
                self._writer.flush()
                self._flushed_at_s = time.monotonic()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            self._give_up(error)
        self._writer = None

    def _add(self, step: int, **payload: Any) -> None:
        if self._writer is not None:
            event = Event(wall_time=time.time(), step=step, **payload)
            self._writer.write(event.SerializeToString())

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
        _log.warning(
            "TensorBoard events stop here, %s: %s; training and %s go on",
            self._folder,
            error,
            METRICS_FILE,
        )


def _new_record_file(path: Path) -> RecordWriter:
    """Returns the writer of a new file. tensorboardX would open a link under its name too."""
    with files.create(path) as file:
        return RecordWriter(f"/proc/self/fd/{file.fileno()}")


def _tensorboard_tag(key: str) -> str:
    """TensorBoard groups charts by what stands before the slash."""
    return f"validation/{key[4:]}" if key.startswith("val_") else f"train/{key}"


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """Running averages behind the gradient noise scale. Both are zero before the first step."""

    gradient_squared: float = 0.0
    """Average of the estimates of |G|^2, G being the true gradient."""
    noise: float = 0.0
    """Average of the estimates of tr(S), S being the covariance of one sequence's gradient."""

    @property
    def value(self) -> float | None:
        """B_simple = tr(S) / |G|^2 in sequences; None before there is a positive estimate of both.

        Batches well below it gain almost linearly from growing, batches well above gain little.
        """
        if self.gradient_squared <= 0 or self.noise <= 0:
            return None
        return self.noise / self.gradient_squared


def update_noise_scale(
    state: NoiseScale,
    *,
    micro_norm_squared: float,
    macro_norm_squared: float,
    batch_size: int,
    accumulate: int,
    rate: float = 0.01,
) -> NoiseScale:
    """The averages after one more step of `accumulate` micro-batches.

    `micro_norm_squared` is the mean over the micro-batches of |their mean gradient|^2, and
    `macro_norm_squared` is |mean gradient of the whole batch|^2, both before clipping;
    `batch_size` is the whole batch in sequences. With one micro-batch the two norms are one and
    nothing can be learned: the state stays. So it does on a step that is not finite. The two
    averages are kept apart, and only their ratio is read: each single estimate is unbiased, a
    ratio of single estimates is not. (Starting from zero scales both alike.)

    Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018), appendix A.1.
    """
    if accumulate <= 1 or not math.isfinite(micro_norm_squared + macro_norm_squared):
        return state
    big, small = float(batch_size), batch_size / accumulate
    gradient_squared = (big * macro_norm_squared - small * micro_norm_squared) / (big - small)
    noise = (micro_norm_squared - macro_norm_squared) / (1 / small - 1 / big)
    return NoiseScale(
        gradient_squared=(1 - rate) * state.gradient_squared + rate * gradient_squared,
        noise=(1 - rate) * state.noise + rate * noise,
    )
