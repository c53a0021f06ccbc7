"""The server's log: one JSON object a line, without prompts and keys, never in the server's way."""

import datetime
import json
import logging
import queue
import threading
import traceback
from typing import IO, Any

_CAPACITY = 10_000
_LOGGERS = ("uvicorn.error", "asyncio", "meshlm")


class LineLog:
    """Writes lines in a thread of its own; those that its reader is too slow for are dropped.

    A pipe that nobody reads fills up, and then a write to it waits: that must not stop the server.
    """

    def __init__(self, stream: IO[str], capacity: int = _CAPACITY) -> None:
        """Begins to write to `stream`; at most `capacity` lines wait."""
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="meshlm-log", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Adds a line with the time, what happened, and the fields; control characters escaped."""
        if self._dropped:
            fields["lines_dropped"] = self._dropped
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **fields}, default=str)
        try:
            # JSON escapes all control characters but this one.
            self._lines.put_nowait(line.replace("\x7f", "\\u007f"))
        except queue.Full:
            self._dropped += 1
        else:
            self._dropped = 0

    def close(self, timeout_s: float = 1.0) -> None:
        """Writes what waits, as far as it goes in that time."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # The reader is gone. The server's work is not to write logs.
                continue


class LogLines(logging.Handler):
    """Makes lines of warnings and errors. An exception's message may quote a prompt: left out."""

    def __init__(self, log: LineLog) -> None:
        """Writes to `log` from `install` on."""
        super().__init__(logging.WARNING)
        self._log = log

    def install(self) -> None:
        """Takes over what uvicorn, asyncio and MeshLM log."""
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.handlers[:] = [self]
            logger.propagate = False
            logger.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        error = record.exc_info[1] if record.exc_info else None
        fields = {} if error is None else describe(error)
        self._log.write(
            "server", level=record.levelname.lower(), message=record.getMessage().strip(), **fields
        )


def describe(error: BaseException) -> dict[str, Any]:
    """Returns the kind of an exception and where it came from, without its message."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": type(error).__name__, "where": where}
