"""Byte streams as bounded chunks: taking exact counts, looking ahead, cutting into lines.

A stream that stops early raises EOFError. One that breaks the rules of its format raises
DamagedStreamError; one that is sound but cannot be read here raises RefusedStreamError.
"""

from collections.abc import Iterable, Iterator

CHUNK_BYTES = 256 << 10

Chunks = Iterator[bytes]


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
        """Whether no byte is left."""
        while self._position == len(self._buffer):
            chunk = next(self._chunks, None)
            if chunk is None:
                return True
            self._buffer, self._position = chunk, 0
        return False

    def parts(self, count: int) -> Chunks:
        """The next `count` bytes as chunks. Raises EOFError if there are fewer."""
        while count > 0:
            if self.at_end():
                raise EOFError
            part = self._buffer[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            yield part

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises EOFError if there are fewer."""
        return b"".join(self.parts(count))

    def skip_zeros(self) -> int:
        """Skips bytes that are zero; returns how many."""
        count = 0
        while not self.at_end():
            rest = self._buffer[self._position :].lstrip(b"\0")
            skipped = len(self._buffer) - self._position - len(rest)
            self._position += skipped
            count += skipped
            if rest:
                break
        return count


class Peeked:
    """Chunks whose beginning can be looked at before they are used."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._held: list[bytes] = []
        self._size = 0

    def head(self, count: int) -> bytes:
        """The first `count` bytes, fewer only if there are no more."""
        while self._size < count and (chunk := next(self._chunks, None)) is not None:
            self._held.append(chunk)
            self._size += len(chunk)
        if len(self._held) > 1:
            self._held = [b"".join(self._held)]
        return self._held[0][:count] if self._held else b""

    def growing(self, limit: int) -> Chunks:
        """The chunks from the start, read only as they are asked for, up to about `limit` bytes.

        They stay for `chunks`.
        """
        size = 0
        for chunk in list(self._held):
            size += len(chunk)
            yield chunk
        while size < limit and (chunk := next(self._chunks, None)) is not None:
            self._held.append(chunk)
            self._size += len(chunk)
            size += len(chunk)
            yield chunk

    def chunks(self) -> Chunks:
        """All chunks, from the start; what was held is let go as it is used."""
        self._held.reverse()
        while self._held:
            yield self._held.pop()
        yield from self._chunks


def lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Each line without its newline, or None for one of more than `limit` bytes, which is never
    held."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        size += len(first)
        parts.append(first)
        if size > limit:
            parts.clear()
        if more:
            yield b"".join(parts) if size <= limit else None
            yield from more[:-1]
            parts, size = [more[-1]], len(more[-1])
    if size:
        yield b"".join(parts) if size <= limit else None


def split(chunks: Chunks, separator: bytes) -> Iterator[Chunks]:
    """The chunks of each part between separators. A separator at the very end begins no part.

    Each part must be used up before the next is asked for. Linear in the number of bytes, whatever
    the separator and the borders of the chunks are; no more than a chunk is held.
    """
    buffer, position, is_last = b"", 0, False

    def part() -> Chunks:
        nonlocal buffer, position, is_last
        while (at := buffer.find(separator, position)) < 0:
            keep = max(position, len(buffer) - len(separator) + 1)
            if keep > position:
                yield buffer[position:keep]
            chunk = next(chunks, None)
            if chunk is None:
                is_last = True
                if keep < len(buffer):
                    yield buffer[keep:]
                return
            buffer, position = buffer[keep:] + chunk, 0
        start, position = position, at + len(separator)
        yield buffer[start:at]

    def is_at_end() -> bool:
        nonlocal buffer, position
        while position == len(buffer) and (chunk := next(chunks, None)) is not None:
            buffer, position = chunk, 0
        return position == len(buffer)

    yield part()
    while not is_last and not is_at_end():
        yield part()
