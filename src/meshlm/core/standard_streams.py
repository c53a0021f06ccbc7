"""Standard output and standard error of a command: writing to them never breaks its work.

A terminal may lack a character, whoever reads may go away (`| head`), a disk may be full, a stream
may be closed from the start (`>&-`). Text that the encoding lacks is written as escapes. What a
failure means depends on what is written:

    messages  of work that has another product, and all of standard error: the writing ends, the
              work goes on; of standard output this is told once, as a warning
    a result  which is all that the command makes: the command ends. Quietly where the reader went
              away, else with one line that says why

`open_streams` puts streams that behave so in place of Python's, for the whole process: `print`,
rich, logging, warnings and tracebacks all write there.
"""

import contextlib
import errno
import io
import logging
import os
import select
import sys
from typing import Any, TextIO

from meshlm.core.errors import MeshLMError, ReaderGoneError

_READER_GONE = (errno.EPIPE, errno.ECONNRESET)

_log = logging.getLogger(__name__)


class _Writer(io.RawIOBase):
    """Bytes to a file descriptor, all of them or none; after a failure they are discarded."""

    def __init__(self, fd: int, name: str, *, is_closed: bool) -> None:
        super().__init__()
        self._fd, self._name = fd, name
        self._is_closed = is_closed
        self._is_discarding = False
        self.has_result = False

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while rest and not self._is_discarding:
                rest = rest[self._write(rest) :]
        except OSError as error:
            # What is still in a buffer comes here again when the process ends.
            self._is_discarding = True
            self._fail(error)
        return length

    def check_open(self) -> None:
        """Raises MeshLMError where the stream was closed from the start."""
        if self._is_closed:
            self._is_discarding = True
            raise MeshLMError(f"{self._name} is closed: give it a file, a pipe or a terminal")

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return not self._is_closed and not self._is_discarding and os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def _write(self, data: memoryview) -> int:
        if self._is_closed:
            if self.has_result:
                self.check_open()
            return len(data)
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            # Another program has set the terminal or the pipe so, and this one waits all the same.
            select.select([], [self._fd], [])
            return 0

    def _fail(self, error: OSError) -> None:
        if self.has_result:
            if error.errno in _READER_GONE:
                raise ReaderGoneError from None
            raise MeshLMError(f"{self._name} cannot be written: {error.strerror}") from None
        if self._fd == 1:
            _log.warning(
                "%s cannot be written any more (%s): the work goes on without it",
                self._name,
                error.strerror,
            )


class StandardStreams:
    """The two streams of this process. Until more is known, standard output has a result."""

    def __init__(self, out: _Writer | None = None) -> None:
        """Knows the writer of standard output; without one there is nothing to decide."""
        self._out = out

    def expect_messages(self) -> None:
        """From now on standard output has messages: a failure does not end the work."""
        if self._out is not None:
            self._out.has_result = False

    def expect_result(self) -> None:
        """From now on standard output has a result; raises MeshLMError where it is closed."""
        if self._out is not None:
            self._out.has_result = True
            self._out.check_open()

    def flush(self) -> None:
        """Writes what waits, or discards it: nothing is left for the interpreter's end."""
        if self._out is not None:
            with contextlib.suppress(MeshLMError):
                sys.stdout.flush()


def open_streams() -> StandardStreams:
    """Returns this process's streams, after putting them into `sys`."""
    is_closed = [stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)]
    _fill_closed()
    out = _Writer(1, "standard output", is_closed=is_closed[1])
    out.has_result = True
    sys.stdout = _text(out, sys.stdout)
    sys.stderr = _text(_Writer(2, "standard error", is_closed=is_closed[2]), sys.stderr)
    return StandardStreams(out)


def _fill_closed() -> None:
    """Opens what is closed of the descriptors 0 to 2: else a file of ours would become one."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)


def _text(writer: _Writer, like: TextIO | None) -> io.TextIOWrapper:
    is_text = isinstance(like, io.TextIOWrapper)
    return io.TextIOWrapper(
        writer,  # type: ignore[arg-type] - it writes all that it gets, as a buffer does
        encoding=like.encoding if is_text else "utf-8",
        errors="backslashreplace",
        line_buffering=is_text and like.line_buffering,
        write_through=is_text and like.write_through,
    )
