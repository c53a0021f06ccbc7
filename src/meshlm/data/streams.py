"""Chunks of bytes: looking ahead, cutting into lines and at separators."""

from collections.abc import Iterable, Iterator

from meshlm.formats.byte_source import Chunks

CHUNK_BYTES = 256 << 10


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
