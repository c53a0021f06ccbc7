"""Progress of `meshlm data prepare`: a bar on a terminal, a line every few seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class Display:
    """Shows how much of the input files has been read, how fast text goes through, and the time
    left."""

    def __init__(self, console: Console, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        """Args: total_bytes, done_bytes: of the input files, as they are on disk."""
        self._console, self._title, self._total_bytes = console, title, total_bytes
        self._done_bytes = self._first_bytes = done_bytes
        self._text_bytes = 0
        self._started_s = self._line_s = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.add_task(title, total=total_bytes, completed=done_bytes, speed="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._done_bytes > self._first_bytes:
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    @property
    def speed_mb_per_s(self) -> float:
        """Text that went through so far, in MB/s of UTF-8."""
        return self._text_bytes / 1e6 / max(time.monotonic() - self._started_s, 1e-9)

    def update(self, done_bytes: int, text_bytes: int) -> None:
        """Says that `done_bytes` of the files are read and `text_bytes` more of text are
        through."""
        self._done_bytes = done_bytes
        self._text_bytes += text_bytes
        if self._bar:
            speed = f"{self.speed_mb_per_s:.1f} MB/s"
            self._bar.update(self._bar.task_ids[0], completed=done_bytes, speed=speed)
        elif time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def _line(self) -> str:
        share = self._done_bytes / max(self._total_bytes, 1)
        elapsed_s = time.monotonic() - self._started_s
        read = max(self._done_bytes - self._first_bytes, 1)
        left_s = elapsed_s * (self._total_bytes - self._done_bytes) / read
        return (
            f"{self._title}: {share:.0%}, {self.speed_mb_per_s:.1f} MB/s of text, "
            f"{max(left_s, 0):.0f} s left"
        )
