"""A stream of bytes in chunks, taken by exact counts.

A stream that stops early raises EOFError. One that breaks the rules of its format raises
DamagedStreamError; one that is sound but cannot be read here raises RefusedStreamError.
"""

import re
from collections.abc import Iterator

Chunks = Iterator[bytes]
_ZEROS = re.compile(rb"\0*")


class DamagedStreamError(Exception):
    """The bytes break the rules of their format. The message says which."""


class RefusedStreamError(Exception):
    """The bytes cannot be used as they are. The message says why and what to do."""


class ByteSource:
    """Chunks, taken by exact counts."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._position = 0

    def at_end(self) -> bool:
        """Returns whether no byte is left."""
        while self._position == len(self._buffer):
            chunk = next(self._chunks, None)
            if chunk is None:
                return True
            self._buffer, self._position = chunk, 0
        return False

    def parts(self, count: int) -> Chunks:
        """Yields the next `count` bytes as chunks. Raises EOFError if there are fewer."""
        while count > 0:
            if self.at_end():
                raise EOFError
            part = self._buffer[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            yield part

    def take(self, count: int) -> bytes:
        """Returns the next `count` bytes. Raises EOFError if there are fewer."""
        return b"".join(self.parts(count))

    def skip_zeros(self) -> int:
        """Skips bytes that are zero, a chunk at a time; returns how many."""
        count = 0
        while not self.at_end():
            match = _ZEROS.match(self._buffer, self._position)
            assert match is not None
            count += match.end() - self._position
            self._position = match.end()
            if self._position < len(self._buffer):
                break
        return count
