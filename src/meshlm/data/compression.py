"""Decompression: gzip, xz, zstd and bzip2 files of any number of members, in bounded chunks.

Each step of a decoder gives at most CHUNK_BYTES, whatever a file claims; the windows of xz and zstd
are capped. What follows the last member is judged as the formats' own tools judge it: zero bytes
after gzip, bzip2 and xz (there a multiple of four) are padding. Anything else is an error, for it
may be a member whose first bytes are damaged.
"""

import bz2
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard

from meshlm.data.streams import CHUNK_BYTES
from meshlm.formats.byte_source import ByteSource, Chunks, DamagedStreamError, RefusedStreamError

MAX_WINDOW_BYTES = 128 << 20  # what `zstd -22 --ultra` and `zstd --long` need
_XZ_MEMORY_BYTES = 192 << 20  # `xz -9` needs 65 MiB
HEAD_BYTES = 10
"""So many bytes tell a compression."""

NAMES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
"""The compressions, by their usual suffixes."""

_MAGIC = {
    ".gz": rb"\x1f\x8b\x08",
    ".xz": rb"\xfd7zXZ\x00",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    ".bz2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
}
_SHORTEST_MAGIC = {".gz": b"\x1f\x8b\x08", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}


def compression_of(head: bytes, expected: str | None = None) -> str | None:
    """The compression of a file that begins with `head`, as a suffix of NAMES, or None.

    Args:
        expected: the compression by the file's name; it counts where the file stops within the
            bytes that would tell.
    """
    for suffix, magic in _MAGIC.items():
        if re.match(magic, head, re.DOTALL):
            return suffix
    if expected and head and len(head) < HEAD_BYTES:
        start = _SHORTEST_MAGIC.get(expected, b"BZh")
        return expected if start.startswith(head) or head.startswith(start) else None
    return None


def decompress(chunks: Chunks, suffix: str) -> Chunks:
    """The content of a file in the compression `suffix`, in bounded chunks.

    Raises:
        EOFError: the file stops in the middle of a member, or is empty.
        DamagedStreamError: it is not of that format, fails its checksum, or goes on after its end.
        RefusedStreamError: it needs more memory than is allowed, or a dictionary.
    """
    return _DECODERS[suffix](chunks)


class _Decoder(Protocol):
    """What lzma's and bz2's decoders have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _GzipDecoder:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        result = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        # A full result may leave more inside of zlib even when all input is used.
        self.needs_input = not self._zlib.unconsumed_tail and len(result) < max_length
        return result


def _members(chunks: Chunks, make: Callable[[], _Decoder], name: str, unit: int) -> Chunks:
    """The content of members and of zero bytes between and after them, a multiple of `unit`."""
    decoder: _Decoder | None = None
    number = padding = 0
    is_fresh = False
    for data in chunks:
        while data:
            if decoder is None:
                if number:
                    rest = data.lstrip(b"\0")
                    padding += len(data) - len(rest)
                    data = rest
                if not data:
                    break
                _check_padding(padding, name, unit)
                decoder, number, padding = make(), number + 1, 0
                is_fresh = number > 1
            part = _step(decoder, data, name, is_fresh)
            is_fresh = is_fresh and not part
            yield part
            while not (decoder.needs_input or decoder.eof):
                yield _step(decoder, b"", name, False)
            data = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None or not number:
        raise EOFError
    _check_padding(padding, name, unit)


def _check_padding(count: int, name: str, unit: int) -> None:
    if count % unit:
        raise DamagedStreamError(f"{count} bytes of {name} padding are no multiple of {unit}")


def _step(decoder: _Decoder, data: bytes, name: str, is_fresh: bool) -> bytes:
    try:
        return decoder.decompress(data, CHUNK_BYTES)
    except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        reason = str(error)
    if "emory usage limit" in reason:
        raise RefusedStreamError(
            f"decompressing it takes more than {_XZ_MEMORY_BYTES >> 20} MiB of memory: "
            "compress it again, for example with: xz -dc FILE | xz -6 > NEW"
        )
    is_other = is_fresh and re.search("header|format|Invalid data stream", reason)
    raise DamagedStreamError(f"bytes that are not {name} follow its end" if is_other else reason)


def _unzstd(chunks: Chunks) -> Chunks:
    """Walks the frames' blocks itself.

    python-zstandard's own readers cannot tell a cut frame from a whole one, and give all that a
    chunk holds at once. A block holds at most 128 KiB of content. Source: RFC 8878, section 3.1.
    """
    source = ByteSource(chunks)
    if source.at_end():
        raise EOFError
    context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    try:
        is_first = True
        while not source.at_end():
            magic = source.take(4)
            number = int.from_bytes(magic, "little")
            if number & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
                for _ in source.parts(int.from_bytes(source.take(4), "little")):
                    pass
            elif number == 0xFD2FB528:
                yield from _zstd_frame(source, magic, context.decompressobj())
            else:
                raise DamagedStreamError(
                    "no zstd frame where one should start"
                    if is_first
                    else "bytes that are not zstd follow its end"
                )
            is_first = False
    except zstandard.ZstdError as error:
        raise DamagedStreamError(str(error)) from error


def _zstd_frame(
    source: ByteSource, magic: bytes, decoder: "zstandard.ZstdDecompressionObj"
) -> Chunks:
    descriptor = source.take(1)
    flags = descriptor[0]
    single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
    size_bytes = (single_segment, 2, 4, 8)[flags >> 6]
    window = source.take(1 - single_segment)
    dictionary = source.take((0, 1, 2, 4)[flags & 3])
    size = source.take(size_bytes)
    _check_zstd_header(window, any(dictionary), int.from_bytes(size, "little"))
    yield decoder.decompress(magic + descriptor + window + dictionary + size)
    last = 0
    while not last:
        head = source.take(3)
        number = int.from_bytes(head, "little")
        last, kind, length = number & 1, number >> 1 & 3, number >> 3
        yield decoder.decompress(head + source.take(1 if kind == 1 else length))
    if has_checksum:
        yield decoder.decompress(source.take(4))


def _check_zstd_header(window: bytes, has_dictionary: bool, content_size: int) -> None:
    """Raises RefusedStreamError where libzstd would give no reason that helps."""
    if has_dictionary:
        raise RefusedStreamError(
            "it was compressed with a zstd dictionary, which is not here: compress it without one"
        )
    window_bytes = content_size
    if window:
        exponent, eighths = window[0] >> 3, window[0] & 7
        window_bytes = (8 + eighths) << (7 + exponent)
    if window_bytes > MAX_WINDOW_BYTES:
        raise RefusedStreamError(
            f"it needs a zstd window of {window_bytes >> 20} MiB, more than the "
            f"{MAX_WINDOW_BYTES >> 20} MiB that are read: compress it again, for example with: "
            "zstd -dc --long=31 FILE | zstd > NEW"
        )


_DECODERS: dict[str, Callable[[Chunks], Chunks]] = {
    ".gz": lambda chunks: _members(chunks, _GzipDecoder, "gzip", 1),
    ".xz": lambda chunks: _members(
        chunks, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES), "xz", 4
    ),
    ".zst": _unzstd,
    ".bz2": lambda chunks: _members(chunks, bz2.BZ2Decompressor, "bzip2", 1),
}
