"""Records: what readers give and encoders take, and how texts and JSON are cut into them.

A record is a document (a line of JSON, a row, a text) or a part of a long text. What cannot be read
as a document is a record too, with the reason, and so is a file or member that is left out.
"""

import codecs
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from meshlm.data.bpe import MAX_UNBROKEN_CHARACTERS, CutPoint, cut_point
from meshlm.data.streams import CHUNK_BYTES, lines, split
from meshlm.formats.byte_source import Chunks

MAX_DOCUMENT_BYTES = 32 << 20
"""A longer line, row or archive member is a bad document. A text file may be of any length."""

PIECE_CHARACTERS = 1 << 20
KEY_BYTES = 64 << 10
BOM = codecs.BOM_UTF8


class Record(NamedTuple):
    """A document, a part of one, or what should have been one.

    Attributes:
        where: what to add to the file's name to find it: ":12" (line), "!name" (archive member),
            ":row 3", ":value 2" (of JSON).
        document: its number among the documents of its file, from 0.
        line: a JSON object that is not parsed yet, or None.
        text: text, where `line` is None.
        key: 8 bytes that choose by hash; of the first part, for all parts.
        set_name: the Pile's `meta.pile_set_name`, where the reader knows it.
        part: its number among the documents that one text or field was split into, from 0.
        first: begins its document.
        last: ends its document.
        bad: the reason why it is no document, or None.
        left_out: the reason why this file or member is not read, or None.
    """

    where: str
    document: int
    line: bytes | None = None
    text: str = ""
    key: bytes = b""
    set_name: str | None = None
    part: int = 0
    first: bool = True
    last: bool = True
    bad: str | None = None
    left_out: str | None = None


def document_key(text: str) -> bytes:
    """8 bytes that depend on the beginning of a document alone (64 KiB): they choose its split."""
    return hashlib.blake2b(text[:KEY_BYTES].encode()[:KEY_BYTES], digest_size=8).digest()


def too_long() -> str:
    """The reason for which a document of more than MAX_DOCUMENT_BYTES is bad."""
    return f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"


def json_lines(
    chunks: Iterable[bytes], where: str, numbers: Iterator[int], *, is_cut: Callable[[], bool]
) -> Iterator[Record]:
    """A record for each line that is not blank.

    If the stream `is_cut`, a last line that is no JSON is left out: it is the beginning of one.
    """
    pending: Record | None = None
    for count, line in enumerate(lines(chunks, MAX_DOCUMENT_BYTES), start=1):
        if pending:
            yield pending
        pending = None
        if line is None:
            pending = Record(f"{where}:{count}", next(numbers), bad=too_long())
            continue
        if line.startswith(BOM):  # of the file, or of one of the files that were joined
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            pending = Record(f"{where}:{count}", next(numbers), line)
    if pending and not (is_cut() and _is_cut_value(pending)):
        yield pending


def json_records(
    chunks: Iterable[bytes], where: str, numbers: Iterator[int], *, is_cut: Callable[[], bool]
) -> Iterator[Record]:
    """A record for each value of JSON lists, and for each object beside them."""
    pending: Record | None = None
    for count, (value, reason) in enumerate(json_values(without_bom(chunks)), start=1):
        if pending:
            yield pending
        pending = Record(f"{where}:value {count}", next(numbers), value, bad=reason)
    if pending and not (is_cut() and _is_cut_value(pending)):
        yield pending


def _is_cut_value(record: Record) -> bool:
    if record.line is None:
        return True
    try:
        msgspec.json.decode(record.line)
    except (ValueError, RecursionError):
        return True
    return False


_NO_END = "the JSON list has no end"
NOT_JSON = "not JSON: text beside the values"
_INSIDE = re.compile(rb'["{}\[\]]')
_IN_LIST = re.compile(rb'["{}\[\],]')
_BETWEEN = re.compile(rb"[{\[]|[^\s,{\[\xef\xbb\xbf]+")  # joined files hold byte-order marks
_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def json_values(chunks: Iterable[bytes]) -> Iterator[tuple[bytes | None, str | None]]:
    """Cuts JSON into the values of its lists and the objects beside them; (value, None) each.

    Where there is no such value, (None, reason). Only the nesting is looked at, so a value may
    still be no JSON. Linear; holds no value of more than MAX_DOCUMENT_BYTES.
    """
    parts: list[bytes] = []
    size = depth = base = 0  # base: the depth of the values, 1 in a list, 0 beside lists
    in_string = is_junk = False
    carried = b""

    def taken(end: bytes) -> tuple[bytes | None, str | None] | None:
        nonlocal parts, size
        whole, long = b"".join([*parts, end]).strip(), size + len(end) > MAX_DOCUMENT_BYTES
        parts, size = [], 0
        if long:
            return None, too_long()
        return (whole, None) if whole else None

    for chunk in chunks:
        chunk, carried = carried + chunk, b""
        start = at = 0
        while at < len(chunk):
            if in_string:
                match = _STRING.match(chunk, at)
                at = match.end() if match else at
                if at < len(chunk):
                    if chunk[at] == 0x5C:  # a backslash; what it escapes is in the next chunk
                        chunk, carried = chunk[:at], chunk[at:]
                    else:
                        in_string = False
                        at += 1
                continue
            if depth == 0:
                match = _BETWEEN.search(chunk, at)
                if match is None:
                    start = at = len(chunk)
                    continue
                start, at = match.start(), match.end()
                opening = match[0]
                if opening == b"[":
                    base, depth, start = 1, 1, at
                elif opening == b"{":
                    base, depth = 0, 1
                elif not is_junk:
                    is_junk = True
                    yield None, NOT_JSON
                continue
            match = (_IN_LIST if depth == base else _INSIDE).search(chunk, at)
            if match is None:
                at = len(chunk)
                continue
            at, mark = match.end(), match[0]
            if mark == b'"':
                in_string = True
            elif mark in b"{[":
                depth += 1
            elif mark == b",":
                if (found := taken(chunk[start : at - 1])) is not None:
                    yield found
                start = at
            else:
                depth -= 1
                if depth < base or depth == 0:
                    end = chunk[start : at - base] if base else chunk[start:at]
                    if (found := taken(end)) is not None:
                        yield found
                    depth, start, is_junk = 0, at, False
        if depth:
            size += len(chunk) - start
            parts.append(chunk[start:])
            if size > MAX_DOCUMENT_BYTES:
                parts.clear()
    if depth:
        found = taken(carried)
        if found is not None:
            yield found
        if base:
            yield None, _NO_END


Again = Callable[[], Chunks]


def text_records(
    chunks: Chunks,
    where: str,
    numbers: Iterator[int],
    *,
    separator: bytes | None = None,
    again: Again | None = None,
    is_cut: Callable[[], bool] = lambda: False,
    cut_point: CutPoint = cut_point,
) -> Iterator[Record]:
    """The records of a file of text: one document, or one for each part between separators.

    A document has as many records as it has pieces, once all of it is known to be UTF-8, and one if
    it is not.

    Args:
        separator: what stands between documents, UTF-8, or None.
        again: gives the same chunks from the start, for documents too long to be held; without it
            they are bad.
        cut_point: where a document may be cut into pieces.
    """
    documents = split(chunks, separator) if separator else iter([chunks])
    long_documents: dict[int, tuple[int, str] | None] | None = None
    line = 1
    for index, document in enumerate(documents):
        held, size, breaks = [], 0, 0
        while size <= MAX_DOCUMENT_BYTES and (chunk := next(document, None)) is not None:
            held.append(chunk)
            size += len(chunk)
        number, is_long = next(numbers), size > MAX_DOCUMENT_BYTES
        reason: tuple[int, str] | None
        if not is_long:
            reason = _not_text(held, is_cut)
        elif again:
            if long_documents is None:  # one more reading serves all long documents of the file
                long_documents = _long_documents(again(), separator, is_cut)
            reason = long_documents[index]
        else:
            reason = (1, too_long())
        if reason or is_long or separator:
            breaks = sum(chunk.count(b"\n") for chunk in held)
        if reason:
            breaks += sum(chunk.count(b"\n") for chunk in document)
            place = f"{where}:{line + reason[0] - 1}"
            yield Record(place, number, part=index, bad=reason[1])
        else:
            rest = _Counted(document)
            texts = _decoded(itertools.chain(_drain(held), rest), is_cut)
            yield from _document(_pieces(texts, cut_point), where, number, index)
            breaks += rest.breaks
        line += breaks + (separator or b"").count(b"\n")


class _Counted:
    """Chunks; `breaks` counts the line breaks that went by."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self.breaks = 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> bytes:
        chunk = next(self._chunks)
        self.breaks += chunk.count(b"\n")
        return chunk


def _document(pieces: Iterator[str], where: str, number: int, part: int) -> Iterator[Record]:
    key = b""
    following = next(pieces, "")
    first = True
    while following or first:
        piece, following = following, next(pieces, "")
        key = key or document_key(piece)
        last = not following
        yield Record(where, number, text=piece, key=key, part=part, first=first, last=last)
        first = False


def _long_documents(
    chunks: Chunks, separator: bytes | None, is_cut: Callable[[], bool]
) -> dict[int, tuple[int, str] | None]:
    """What `_not_text` says of each document of more than MAX_DOCUMENT_BYTES, by its index."""
    result: dict[int, tuple[int, str] | None] = {}
    for index, document in enumerate(split(chunks, separator) if separator else iter([chunks])):
        held, size = [], 0
        while size <= MAX_DOCUMENT_BYTES and (chunk := next(document, None)) is not None:
            held.append(chunk)
            size += len(chunk)
        if size > MAX_DOCUMENT_BYTES:
            result[index] = _not_text(itertools.chain(_drain(held), document), is_cut)
            for _ in document:
                pass
    return result


def without_bom(chunks: Iterable[bytes]) -> Chunks:
    """The chunks without a byte-order mark at their start."""
    chunks = iter(chunks)
    head = b""
    while len(head) < len(BOM) and (chunk := next(chunks, None)) is not None:
        head += chunk
    yield head.removeprefix(BOM)
    yield from chunks


def _drain(held: list[bytes]) -> Chunks:
    """The chunks, each let go as it is used."""
    held.reverse()
    while held:
        yield held.pop()


def _decoded(chunks: Iterable[bytes], is_cut: Callable[[], bool]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in without_bom(chunks):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=not is_cut())


def _not_text(chunks: Iterable[bytes], is_cut: Callable[[], bool]) -> tuple[int, str] | None:
    """The line, from 1, of the first byte that is not UTF-8, and the reason; None if all is
    text."""
    line = 1
    texts = _decoded(chunks, is_cut)
    while True:
        try:
            text = next(texts, None)
        except UnicodeDecodeError as error:
            return line + error.object[: error.start].count(b"\n"), not_utf8(error)
        if text is None:
            return None
        line += text.count("\n")


def not_utf8(error: UnicodeDecodeError) -> str:
    """The reason for which bytes are no text, with the way out that is usual in Latin alphabets."""
    byte = error.object[error.start]
    return (
        f"not UTF-8 ({error.reason} 0x{byte:02x}); if it is Windows-1252 or Latin-1, convert it: "
        "iconv -f WINDOWS-1252 -t UTF-8"
    )


def _pieces(texts: Iterable[str], cut_point: CutPoint) -> Iterator[str]:
    """The text in parts of about PIECE_CHARACTERS, cut where it changes no token."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size < PIECE_CHARACTERS + CHUNK_BYTES:
            continue
        whole = "".join(held)
        cut = cut_point(whole, PIECE_CHARACTERS, len(whole) - 1)
        if cut is None and size > PIECE_CHARACTERS + MAX_UNBROKEN_CHARACTERS:
            cut = len(whole)
        if cut is not None:
            yield whole[:cut]
            whole = whole[cut:]
        held, size = [whole], len(whole)
    if rest := "".join(held):
        yield rest
