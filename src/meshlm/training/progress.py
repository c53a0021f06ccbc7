"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import io
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from meshlm.core import files

_SMOOTHING = 0.1
_PLAIN_LINE_EVERY_S = 10.0

_log = logging.getLogger("meshlm.run")


class TrainingProgress:
    """Shows steps as they are done; everything said goes to the run's log.txt too."""

    def __init__(self, run: Path, console: Console, *, start: int, total: int) -> None:
        self._console = console
        self._start, self._total = start, total
        self._loss: float | None = None
        self._line_at_s = 0.0
        self._first_done_s: float | None = None
        self._handler = _file_handler(run / "log.txt")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=total, completed=start, loss="-", rate="-"
        )

    def __enter__(self) -> Self:
        _log.addHandler(self._handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        _log.removeHandler(self._handler)
        self._handler.close()

    def say(self, text: str) -> None:
        """Prints a line above the bar, and keeps it in log.txt."""
        _log.info(text)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows one step's line of metrics."""
        loss, rate = metrics["loss"], metrics["tokens_per_s"]
        if loss is not None:
            old = self._loss
            self._loss = loss if old is None else old + _SMOOTHING * (loss - old)
        shown = "-" if self._loss is None else f"{self._loss:.3f}"
        self._bar.update(self._task, completed=step, loss=shown, rate=f"{rate:,.0f}")
        now_s = time.monotonic()
        if now_s - self._line_at_s >= _PLAIN_LINE_EVERY_S or step == self._total:
            self._line_at_s = now_s
            self._plain_line(step, metrics)

    def _plain_line(self, step: int, metrics: Mapping[str, Any]) -> None:
        loss = "-" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        line = (
            f"step {step:,}/{self._total:,}  loss {loss}  {metrics['tokens_per_s']:,.0f} tok/s  "
            f"lr {metrics['learning_rate']:.2e}{self._left(step)}"
        )
        _log.info(line)
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        """Returns the time left, reckoned from the second step on: the first one compiles."""
        if self._first_done_s is None:
            self._first_done_s = time.monotonic()
            return "  (the first step compiles)"
        passed_s = time.monotonic() - self._first_done_s
        left_s = passed_s / max(1, step - self._start - 1) * (self._total - step)
        return f"  {left_s / 60:,.1f} min left"


class _LogFile(logging.StreamHandler[io.TextIOWrapper]):
    """As `logging.FileHandler`, for a file that is open already."""

    def close(self) -> None:
        self.stream.close()
        super().close()


def _file_handler(path: Path) -> logging.Handler:
    handler = _LogFile(io.TextIOWrapper(files.append(path), encoding="utf-8", write_through=True))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
