"""Byte streams: compressed files as bounded chunks, and the members of a tar archive.

Nothing here holds more than a chunk, whatever a file claims: each step of a decoder gives at most
CHUNK_BYTES, and zstd's and xz's windows are capped. A stream that stops early raises EOFError, one
that is damaged raises DamagedStreamError.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator

import zstandard

CHUNK_BYTES = 256 << 10
MAX_WINDOW_BYTES = 128 << 20  # what `zstd -22 --ultra` and `zstd --long` need
_XZ_MEMORY_BYTES = 192 << 20  # `xz -9` needs 65 MiB
_MAX_TAR_HEADER_BYTES = 1 << 20
_TAR_BLOCK = 512

Chunks = Iterator[bytes]


class DamagedStreamError(Exception):
    """The bytes break their format's rules."""


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
        while count:
            if self.at_end():
                raise EOFError
            part = self._buffer[self._position : self._position + count]
            self._position += len(part)
            count -= len(part)
            yield part

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises EOFError if there are fewer."""
        return b"".join(self.parts(count))


def decompress(chunks: Chunks, suffix: str) -> Chunks:
    """The content of a .gz, .xz or .zst file, of any number of members, in bounded chunks.

    Raises:
        EOFError: the file stops in the middle of a member, or is empty.
        DamagedStreamError: it is not of that format, fails its checksum, or asks for too large a
        window.
    """
    try:
        yield from _DECODERS[suffix](chunks)
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DamagedStreamError(str(error)) from error


def _gunzip(chunks: Chunks) -> Chunks:
    decoder, started = None, False
    for data in chunks:
        while data:
            if decoder is None:
                data = data.lstrip(b"\0") if started else data  # padding after a member is legal
                decoder, started = zlib.decompressobj(wbits=31), True
                continue
            yield decoder.decompress(data, CHUNK_BYTES)
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            decoder = None if decoder.eof else decoder
    while decoder is not None and not decoder.eof:
        rest = decoder.decompress(b"", CHUNK_BYTES)
        if not rest and not decoder.eof:
            raise EOFError
        yield rest
    if not started:
        raise EOFError


def _unxz(chunks: Chunks) -> Chunks:
    decoder, started = None, False
    for data in chunks:
        while data:
            if decoder is None:
                data = data.lstrip(b"\0") if started else data
                decoder, started = lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES), True
                continue
            yield decoder.decompress(data, CHUNK_BYTES)
            while not (decoder.needs_input or decoder.eof):
                yield decoder.decompress(b"", CHUNK_BYTES)
            data = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None or not started:
        raise EOFError


def _unzstd(chunks: Chunks) -> Chunks:
    """Walks the frames' blocks itself.

    python-zstandard's own readers cannot tell a cut frame from a whole one, and give all that a
    chunk holds at once. A block holds at most 128 KiB of content. Source: RFC 8878, section 3.1.
    """
    source = ByteSource(chunks)
    if source.at_end():
        raise EOFError
    context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    while not source.at_end():
        magic = source.take(4)
        number = int.from_bytes(magic, "little")
        if number & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
            for _ in source.parts(int.from_bytes(source.take(4), "little")):
                pass
        elif number == 0xFD2FB528:
            yield from _zstd_frame(source, magic, context.decompressobj())
        else:
            raise DamagedStreamError("no zstd frame where one should start")


def _zstd_frame(
    source: ByteSource, magic: bytes, decoder: "zstandard.ZstdDecompressionObj"
) -> Chunks:
    descriptor = source.take(1)
    flags = descriptor[0]
    single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
    size_bytes = (single_segment, 2, 4, 8)[flags >> 6]
    rest = source.take(1 - single_segment + (0, 1, 2, 4)[flags & 3] + size_bytes)
    yield decoder.decompress(magic + descriptor + rest)
    last = 0
    while not last:
        head = source.take(3)
        number = int.from_bytes(head, "little")
        last, kind, size = number & 1, number >> 1 & 3, number >> 3
        body = source.take((1 if kind == 1 else size) + (4 if last and has_checksum else 0))
        yield decoder.decompress(head + body)


_DECODERS: dict[str, Callable[[Chunks], Chunks]] = {".gz": _gunzip, ".xz": _unxz, ".zst": _unzstd}


def tar_members(source: ByteSource) -> Iterator[tuple[str, int, Chunks]]:
    """Name, size in bytes and content of each regular file in a tar archive (ustar, GNU or pax).

    Unlike tarfile, it reads no header of more than a mebibyte, and does not take a damaged header
    for the archive's end.

    Raises:
        EOFError: the archive stops before its end mark.
        DamagedStreamError: a header is wrong, or too long.
    """
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = source.take(_TAR_BLOCK)
        if header == bytes(_TAR_BLOCK):
            for _ in iter(source.at_end, True):
                source.take(1)
            return
        size, kind = _tar_size(header, pax), header[156:157]
        if kind in b"xLgK":
            if size > _MAX_TAR_HEADER_BYTES:
                raise DamagedStreamError(f"a tar header of {size} bytes")
            body = source.take(size)
            source.take(-size % _TAR_BLOCK)
            if kind == b"x":
                pax = _pax_records(body)
            elif kind == b"L":
                long_name = body.rstrip(b"\0").decode(errors="replace")
            continue
        content = source.parts(size)
        if kind in b"0\x007":
            yield pax.get("path") or long_name or _tar_name(header), size, content
        for _ in content:
            pass
        source.take(-size % _TAR_BLOCK)
        long_name, pax = None, {}


def _tar_size(header: bytes, pax: dict[str, str]) -> int:
    claimed = header[148:156].strip(b" \0")
    try:
        if int(claimed or b"0", 8) != sum(header[:148]) + sum(header[156:]) + 8 * 0x20:
            raise DamagedStreamError("a tar header fails its checksum")
        if "size" in pax:
            return int(pax["size"])
        if header[124] & 0x80:  # GNU's base-256, for 8 GiB and more
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise DamagedStreamError("a tar header has a malformed number") from None


def _tar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _pax_records(body: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    while body:
        length, _, _ = body.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(body):
            raise DamagedStreamError("a malformed pax header")
        record, body = body[len(length) + 1 : int(length)], body[int(length) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        records[key.decode(errors="replace")] = value.decode(errors="replace")
    return records


def lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Each line without its newline, or None for one of more than `limit` bytes, which is never
    held."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        size += len(first)
        parts = [*parts, first] if size <= limit else []
        if more:
            yield b"".join(parts) if size <= limit else None
            yield from more[:-1]
            parts, size = [more[-1]], len(more[-1])
    if size:
        yield b"".join(parts) if size <= limit else None
