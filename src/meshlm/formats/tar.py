"""Tar archives (V7, ustar, GNU and pax), read as a stream.

Archives come from strangers. Numbers are digits only, headers are at most a mebibyte long, and a
damaged header is an error; the standard library's tarfile takes it for the end of the archive. All
members are yielded, whatever their type and name: the caller decides which to accept.

Source: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar, "Basic Tar Format".
"""

import re
from collections.abc import Iterator

from meshlm.formats.byte_source import ByteSource, Chunks, DamagedStreamError, RefusedStreamError

BLOCK_BYTES = 512
FILE, FOLDER, VOLUME_PART = b"0", b"5", b"M"
# Links, devices, folders and pipes have no content, whatever size their header states.
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", FOLDER, b"6")
_MAX_HEADER_BYTES = 1 << 20
_MAX_NUMBER = 1 << 63
_PAX_LENGTH = re.compile(rb"([0-9]{1,7}) ")


class Member:
    """A member of an archive. Its content can be read until the next member is requested.

    Attributes:
        name: bytes that are not UTF-8 are surrogates, as `os.fsdecode` gives them.
        kind: the type flag of its header; `FILE` for every form of a plain file.
        num_bytes: as stated. Only files and members of unknown types have content.
    """

    def __init__(self, source: ByteSource, name: str, kind: bytes, num_bytes: int) -> None:
        self.name, self.kind, self.num_bytes = name, kind, num_bytes
        self._source = source
        self._left = 0 if kind in _WITHOUT_CONTENT else num_bytes
        self._padding = -self._left % BLOCK_BYTES

    @property
    def left(self) -> int:
        """Returns the number of bytes of content that were not taken yet."""
        return self._left

    def take(self, num_bytes: int) -> bytes:
        """Returns the next `num_bytes`, which must be left."""
        assert num_bytes <= self._left
        self._left -= num_bytes
        return self._source.take(num_bytes)

    def chunks(self) -> Chunks:
        """Yields the rest of the content."""
        parts = self._source.parts(self._left)
        for part in parts:
            self._left -= len(part)
            yield part

    def finish(self) -> None:
        """Skips the rest of the content and the padding of its last block."""
        for _ in self.chunks():
            pass
        self._source.take(self._padding)


def is_header(block: bytes) -> bool:
    """Returns whether `block`, the first 512 bytes of a file, is a tar header of any age."""
    try:
        _check_sum(block)
    except DamagedStreamError:
        return False
    return len(block) == BLOCK_BYTES and any(block)


def tar_members(source: ByteSource) -> Iterator[Member]:
    """Yields each member of a tar archive, and of archives that are concatenated to it.

    `tar` itself ignores the latter. Global pax headers are skipped: one name or one size for all
    members makes no sense.

    Raises:
        EOFError: the archive stops before its end mark.
        DamagedStreamError: a header is wrong, or too long, or other bytes follow the end.
        RefusedStreamError: a member is a sparse file, whose bytes are not its content.
    """
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = source.take(BLOCK_BYTES)
        if header == bytes(BLOCK_BYTES):
            if long_name is not None or pax:
                raise DamagedStreamError("it ends where a long name or a pax header has no member")
            following = _after_end(source)
            if following is None:
                return
            header = following
        _check_sum(header)
        size, kind = _size(header[124:136]), header[156:157]
        if kind in b"xXgLK":
            body = _header_body(source, size)
            if kind in b"xX":  # Solaris writes a capital
                pax = _pax_records(body)
            elif kind == b"L":
                long_name = body.rstrip(b"\0").decode(errors="surrogateescape")
            continue
        name = pax.get("path") or long_name or _name(header)
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in pax):
            name = pax.get("GNU.sparse.name", name)
            shown = name if name.isprintable() else repr(name)
            raise RefusedStreamError(
                f"member {shown} is a sparse file: pack the archive again without tar's --sparse"
            )
        size = _number(pax["size"], 10) if "size" in pax else size
        member = Member(source, name, _plain(kind, name), size)
        yield member
        member.finish()
        long_name, pax = None, {}


def _after_end(source: ByteSource) -> bytes | None:
    """Returns the header of an archive that follows the end of another; None where none does."""
    padding = source.skip_zeros()
    if source.at_end():
        return None
    header = b"" if padding % BLOCK_BYTES else b"".join(_up_to(source, BLOCK_BYTES))
    if not is_header(header):
        raise DamagedStreamError("bytes that are no tar header follow the archive's end")
    return header


def _up_to(source: ByteSource, count: int) -> Chunks:
    """Yields the next `count` bytes, or those that there are."""
    try:
        yield from source.parts(count)
    except EOFError:
        return


def _header_body(source: ByteSource, size: int) -> bytes:
    if size > _MAX_HEADER_BYTES:
        raise DamagedStreamError(f"a tar header of {size} bytes")
    body = source.take(size)
    source.take(-size % BLOCK_BYTES)
    return body


def _check_sum(header: bytes) -> None:
    """Raises unless the sum of the bytes is as stated; old programs add them as signed numbers."""
    rest, stated = header[:148] + b" " * 8 + header[156:], _octal(header[148:156])
    difference = sum(rest) - stated
    if difference and difference != 256 * sum(byte >= 0x80 for byte in rest):
        raise DamagedStreamError("a tar header fails its checksum")


def _size(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base-256, for 8 GiB and more
        if field[0] != 0x80:
            raise DamagedStreamError("a tar header has a malformed number: it is negative")
        return _bounded(int.from_bytes(field[1:], "big"))
    return _octal(field)


def _octal(field: bytes) -> int:
    return _number(field.strip(b" \0").decode("latin-1") or "0", 8)


def _number(digits: str, base: int) -> int:
    """Returns the number; int() would also accept signs, underscores and any number of digits."""
    if not re.fullmatch(r"[0-7]{1,20}" if base == 8 else r"[0-9]{1,20}", digits):
        raise DamagedStreamError("a tar header has a malformed number")
    return _bounded(int(digits, base))


def _bounded(number: int) -> int:
    if number >= _MAX_NUMBER:
        raise DamagedStreamError(f"a tar header has a malformed number: {number}")
    return number


def _plain(kind: bytes, name: str) -> bytes:
    """Returns the type flag; `FILE` also for plain files of V7 and for contiguous files."""
    if kind == b"\0":
        return FOLDER if name.endswith("/") else FILE
    return FILE if kind == b"7" else kind


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="surrogateescape")


def _pax_records(body: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    at = 0
    while at < len(body):
        length = _PAX_LENGTH.match(body, at)
        end = at + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(body) or body[end - 1] != 0x0A:
            raise DamagedStreamError("a malformed pax header")
        key, _, value = body[length.end() : end - 1].partition(b"=")
        records[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
        at = end
    return records
