"""What a run shows and writes beside its checkpoints; of several processes, the first alone.

Metrics are the truth and end the run where they cannot be written. The rest are views of it: a view
that cannot be written is told of once, and the run goes on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from meshlm.core.errors import UsageError
from meshlm.core.processes import is_first
from meshlm.training.metrics import MetricsLog, why_skipped
from meshlm.training.progress import TrainingProgress
from meshlm.training.report import write_report
from meshlm.training.run_folder import add_incident, write_samples

_log = logging.getLogger(__name__)


class RunOutput:
    """The metrics, progress, incidents, samples and report of one start of a run."""

    def __init__(
        self, run: Path, console: Console, *, start: int, total: int, begins: bool
    ) -> None:
        """Opens them; with `begins`, metrics of an earlier history are dropped.

        Raises:
            MeshLMError: metrics.jsonl cannot be written.
        """
        self._run, self._parts = run, None
        self._unwritable: set[str] = set()
        if is_first():
            log = MetricsLog(run, resume_step=None if begins else start)
            self._parts = log, TrainingProgress(run, console, start=start, total=total)

    def __enter__(self) -> Self:
        if self._parts is not None:
            self._parts[1].__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._parts is not None:
            log, progress = self._parts
            progress.__exit__(kind, error, trace)
            log.close()

    def say(self, text: str) -> None:
        """Shows a line, and keeps it in log.txt."""
        if self._parts is not None:
            self._parts[1].say(text)

    def incident(self, step: int, kind: str, message: str) -> None:
        """Keeps an incident."""
        if self._parts is not None:
            self._write("incidents", lambda: add_incident(self._run, step, kind, message))

    def line(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes and shows a step's line of metrics."""
        if self._parts is None:
            return
        log, progress = self._parts
        log.write(step, **values)
        progress.step(step, values)
        if values.get("val_loss") is not None:
            self.say(
                f"step {step}: held-out loss {values['val_loss']:.4f}, perplexity "
                f"{values['val_perplexity']:,.2f}, {values['val_bits_per_byte']:.4f} bits per byte"
            )
        if values["skipped"]:
            self.say(f"step {step}: {why_skipped(values)}, weights left as before")

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Writes the samples of a step, and shows the first."""
        if self._parts is None:
            return
        self._write("samples", lambda: write_samples(self._run, step, samples))
        prompt, text = samples[0]
        self.say(f"step {step}: {(prompt + text)!r}")

    def report(self) -> None:
        """Writes report.html anew."""
        if self._parts is not None:
            self._write("the report", lambda: write_report(self._run))

    def _write(self, what: str, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, UsageError) as error:
            if what not in self._unwritable:
                _log.warning("%s cannot be written (%s): training goes on", what, error)
            self._unwritable.add(what)
