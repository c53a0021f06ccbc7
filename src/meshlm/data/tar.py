"""Tar archives: ustar, GNU and pax, read as a stream."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from meshlm.data.streams import ByteSource, Chunks, DamagedStreamError, RefusedStreamError

_MAX_HEADER_BYTES = 1 << 20
_PAX_LENGTH = re.compile(rb"([0-9]{1,7}) ")
BLOCK_BYTES = 512
_FILES = (b"0", b"\0", b"7")
_WITHOUT_TEXT = (b"1", b"2", b"3", b"4", b"5", b"6", b"D", b"V")
"""Links, devices, folders, pipes, and the name of the whole archive."""


class Member(NamedTuple):
    """A member of an archive that holds text, or may do.

    Attributes:
        name: bytes that are not UTF-8 are surrogates, as `os.fsdecode` gives them.
        size_bytes: of the content.
        content: in chunks.
        left_out: why the content is not the file's text, or "".
    """

    name: str
    size_bytes: int
    content: Chunks
    left_out: str = ""


def is_header(block: bytes) -> bool:
    """Whether `block`, the first 512 bytes of a file, is a tar header of any age."""
    try:
        _check_sum(block)
    except DamagedStreamError:
        return False
    return len(block) == BLOCK_BYTES and any(block)


def tar_members(source: ByteSource) -> Iterator[Member]:
    """Each regular file in a tar archive (ustar, GNU or pax), and what is of no known type.

    Unlike tarfile, it reads no header of more than a mebibyte, and does not take a damaged header
    for the archive's end. An archive that follows the end of another is read too; `tar` would leave
    it out.

    Raises:
        EOFError: the archive stops before its end mark.
        DamagedStreamError: a header is wrong, or too long, or other bytes follow the end.
        RefusedStreamError: a member is a sparse file, whose bytes are not its text.
    """
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = source.take(BLOCK_BYTES)
        if header == bytes(BLOCK_BYTES):
            padding = source.skip_zeros()
            if source.at_end():
                return
            header = b"" if padding % BLOCK_BYTES else b"".join(_up_to(source, BLOCK_BYTES))
            if not is_header(header):
                raise DamagedStreamError("bytes that are no tar header follow the archive's end")
        size, kind = _tar_size(header, pax), header[156:157]
        if kind in b"xXgLK":
            if size > _MAX_HEADER_BYTES:
                raise DamagedStreamError(f"a tar header of {size} bytes")
            body = source.take(size)
            source.take(-size % BLOCK_BYTES)
            if kind in b"xX":  # Solaris writes a capital
                pax = _pax_records(body)
            elif kind == b"L":
                long_name = body.rstrip(b"\0").decode(errors="surrogateescape")
            continue
        name = pax.get("path") or long_name or _tar_name(header)
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in pax):
            name = pax.get("GNU.sparse.name", name)
            raise RefusedStreamError(
                f"member {name} is a sparse file: pack the archive again without tar's --sparse"
            )
        content = source.parts(size)
        if kind not in _WITHOUT_TEXT:
            yield Member(name, size, content, _reason(kind))
        for _ in content:
            pass
        source.take(-size % BLOCK_BYTES)
        long_name, pax = None, {}


def _reason(kind: bytes) -> str:
    """Why the content of a member of this type is not the text of a file, or ""."""
    if kind == b"M":
        return "the rest of a file that begins in another volume of the archive"
    return "" if kind in _FILES else f"a tar member of an unknown type ({kind!r})"


def _up_to(source: ByteSource, count: int) -> Chunks:
    """The next `count` bytes, or those that there are."""
    try:
        yield from source.parts(count)
    except EOFError:
        return


def _check_sum(header: bytes) -> None:
    if _octal(header[148:156]) != sum(header[:148]) + sum(header[156:]) + 8 * 0x20:
        raise DamagedStreamError("a tar header fails its checksum")


def _tar_size(header: bytes, pax: dict[str, str]) -> int:
    _check_sum(header)
    if "size" in pax:
        return _number(pax["size"], 10)
    if header[124] & 0x80:  # GNU's base-256, for 8 GiB and more
        return int.from_bytes(header[125:136], "big")
    return _octal(header[124:136])


def _octal(field: bytes) -> int:
    return _number(field.strip(b" \0").decode("latin-1") or "0", 8)


def _number(digits: str, base: int) -> int:
    """The number; int() alone would take signs, underscores and digits without end."""
    try:
        if re.fullmatch(r"[0-9]{1,20}", digits):
            return int(digits, base)
    except ValueError:
        pass
    raise DamagedStreamError("a tar header has a malformed number")


def _tar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="surrogateescape")


def _pax_records(body: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    at = 0
    while at < len(body):
        length = _PAX_LENGTH.match(body, at)
        end = at + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(body):
            raise DamagedStreamError("a malformed pax header")
        key, _, value = body[length.end() : end].removesuffix(b"\n").partition(b"=")
        records[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
        at = end
    return records
