"""What a file holds: decided by its content, with its name as the second witness.

A file is read as one of these kinds:

    parquet, arrow, tar   by their magic bytes, whatever the name is
    jsonl                 one JSON object in each line
    json                  JSON values: lists of objects, or objects that span lines
    text                  anything else that is text

A file named .jsonl (or the like) holds JSON. Any other file does if it begins with a JSON object,
or a list of objects, that has the text field, and nothing but further values follows. A single
object needs a string there, so that a package.json or a notebook stays a text.
"""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from meshlm.core.lfs import begins_as_pointer
from meshlm.data import compression
from meshlm.data.parsing import find_field, string_fields, text_field_hint
from meshlm.data.records import BOM, MAX_DOCUMENT_BYTES, NOT_JSON, json_values, without_bom
from meshlm.data.streams import CHUNK_BYTES, Peeked
from meshlm.formats.tar import BLOCK_BYTES, is_header

Format = Literal["auto", "text", "json"]
LOOK_BYTES = 8 << 10
_LOOK_VALUES = 100  # of JSON: the first may be a header, empty, or null

LABELS = {
    "jsonl": "JSON lines",
    "json": "JSON values",
    "parquet": "parquet",
    "arrow": "Arrow",
    "tar": "tar",
    "text": "text",
    "left out": "left out",
}
"""The kinds, as messages say them."""

_COMPRESSED = {
    ".gz": ".gz",
    ".tgz": ".gz",
    ".xz": ".xz",
    ".txz": ".xz",
    ".zst": ".zst",
    ".zstd": ".zst",
    ".tzst": ".zst",
    ".bz2": ".bz2",
    ".tbz": ".bz2",
    ".tbz2": ".bz2",
}
_TARS = (".tgz", ".txz", ".tzst", ".tbz", ".tbz2")
_NAMED = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".ldjson": "jsonl",
    ".jl": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "tar",
}


def named_compression(name: str) -> str | None:
    """The compression that a file's name tells, a suffix of compression.NAMES, or None."""
    return _COMPRESSED.get(os.path.splitext(name)[1].lower())


def named_kind(name: str) -> str | None:
    """The kind that a file's name without its compression tells, or None."""
    if os.path.splitext(name.lower())[1] in _TARS:
        return "tar"
    return _NAMED.get(os.path.splitext(_without_compression(name))[1])


def _without_compression(name: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    return stem if suffix in _COMPRESSED else name.lower()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file was found to hold.

    Attributes:
        kind: a key of LABELS.
        reason: why it is left out.
        is_fatal: the file was to be read, by its name, so that leaving it out would be wrong.
        hint: what the user might have wanted otherwise, or "".
    """

    kind: str
    reason: str = ""
    is_fatal: bool = False
    hint: str = ""


def _left_out(reason: str, *, is_fatal: bool = False) -> Found:
    return Found(kind="left out", reason=reason, is_fatal=is_fatal)


_MARKUP = re.compile(rb"\s*<(?:!doctype|html|\?xml|head|body|error)\b", re.IGNORECASE)
_UTF16, _UTF32 = (b"\xff\xfe", b"\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")

# No text begins with these.
_BINARY = {
    rb"PK(?:\x03\x04|\x05\x06)": "a zip archive (.zip, .docx, .npz, .pt): unpack it",
    rb"\x80[\x02-\x05]": "a Python pickle",
    rb"\x93NUMPY": "a NumPy array",
    rb"SQLite format 3\0": "an SQLite database",
    rb".{3}[\0\x01]\0{4}\{": "a safetensors file",
    rb"Obj\x01": "an Avro file, which is not read: convert it to parquet or JSON lines",
    rb"%PDF-": "a PDF: extract its text first",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    rb"Rar!\x1a\x07": "a RAR archive: unpack it",
    rb"\x04\x22\x4d\x18": "lz4, which is not read: decompress it",
    rb"\xff\x06\0\0sNaPpY": "snappy, which is not read: decompress it",
    rb"\x1f\x9d": "compress (.Z), which is not read: decompress it",
    rb"\x89HDF\r\n": "an HDF5 file",
    rb"\xd0\xcf\x11\xe0": "an old Office document: extract its text first",
    rb"\x89PNG": "a PNG image",
    rb"\xff\xd8\xff": "a JPEG image",
    rb"\x7fELF": "an ELF program or library",
}
# A text may begin with these, one without NUL bytes.
_BINARY_WITH_NUL = {
    rb"GGUF": "a GGUF file",
    rb"ORC": "an ORC file, which is not read: convert it to parquet or JSON lines",
    rb"FEA1": "Feather version 1, which is not read: write it again as version 2",
    rb"PARE": "an encrypted parquet file",
    rb"GIF8": "a GIF image",
}


def encoding_of(head: bytes) -> str | None:
    """The encoding that a byte-order mark tells, "UTF-16" or "UTF-32", or None."""
    if head.startswith(_UTF32):
        return "UTF-32"
    return "UTF-16" if head.startswith(_UTF16) else None


def encoding_without_mark(head: bytes) -> str | None:
    """The encoding of mostly Latin text in UTF-16 or UTF-32, from where its NUL bytes are."""
    if head.startswith(BOM):
        return None
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        unit = 4 if "32" in encoding else 2
        whole = head[: len(head) // unit * unit]
        low = 0 if encoding.endswith("LE") else unit - 1
        count = len(whole) // unit
        zeros = [whole[i::unit].count(0) for i in range(unit)]
        if zeros[low] or any(2 * z < count for i, z in enumerate(zeros) if i != low):
            continue
        text = whole.decode(encoding, errors="replace")
        if 0 < count <= 1.1 * sum(c.isprintable() or c.isspace() for c in text):
            return encoding
    return None


def find_kind(
    peeked: Peeked, name: str, *, named: bool, text_field: str, format: Format = "auto"
) -> Found:
    """What a decompressed file, or a member of an archive, holds.

    Args:
        peeked: its content as UTF-8, if it is text.
        name: of the file.
        named: it was given by name, and not found in a folder.
        text_field: the field that makes a JSON object a document.
        format: what text is, where it is not to be found out.
    """
    head = peeked.head(LOOK_BYTES)
    expected = named_kind(name)
    if (container := _container(head, expected)) is not None:
        return Found(kind=container)
    if (reason := _foreign(head, expected, named)) is not None:
        return _left_out(reason, is_fatal=named or expected is not None)
    if expected in ("parquet", "arrow", "tar"):
        return _left_out(
            f"it is named {LABELS[expected]} but is not that ({_beginning(head)}): get it again",
            is_fatal=True,
        )
    if format == "text":
        return Found(kind="text")
    look = _look_at_json(peeked, text_field)
    if format == "json" or expected == "jsonl":
        return Found(kind=look.kind if look else "jsonl")
    found = _text_or_json(look, named, text_field)
    is_json = _without_compression(name).endswith(".json")
    if found == Found(kind="text") and named and is_json:
        return Found(
            kind="text", hint=f"its JSON is no list or lines of objects with `{text_field}`"
        )
    return found


def _container(head: bytes, expected: str | None) -> str | None:
    if head.startswith(b"PAR1") and (expected == "parquet" or b"\0" in head):
        return "parquet"
    is_stream = head.startswith(b"\xff\xff\xff\xff") and int.from_bytes(head[4:8], "little") > 0
    if head.startswith(b"ARROW1\0\0") or (is_stream and head[7:8] < b"\x10"):
        return "arrow"
    block = head[:BLOCK_BYTES]
    is_old = expected == "tar" and (is_header(block) or not any(block))
    if block and (is_old or (block[257:262] == b"ustar" and b"\0" in block)):
        return "tar"
    return None


def _foreign(head: bytes, expected: str | None, named: bool) -> str | None:
    """The reason for which the bytes are no text and no JSON, or None."""
    if begins_as_pointer(head):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull"
    if expected and _MARKUP.match(head):
        return (
            f"it is named {LABELS[expected]} but is an HTML or XML page, perhaps a server's error "
            "message: get it again"
        )
    if inner := compression.compression_of(head[: compression.HEAD_BYTES]):
        return f"it is compressed twice, with {compression.NAMES[inner]} inside: decompress it once"
    for magic, what in _BINARY.items():
        if re.match(magic, head, re.DOTALL):
            return f"it is {what}" if named else what
    if b"\0" not in head:
        return None
    if encoding := encoding_without_mark(head):
        return (
            f"{encoding} without a byte-order mark, it seems: "
            f"convert it: iconv -f {encoding} -t UTF-8"
        )
    for magic, what in _BINARY_WITH_NUL.items():
        if re.match(magic, head):
            return f"it is {what}" if named else what
    if named or expected:
        return None  # what was asked for is text, or says in which line it is not
    return f"binary: byte {head.index(0)} is NUL"


def _beginning(head: bytes) -> str:
    if not head:
        return "it is empty"
    start = head[:32].decode(errors="replace").split("\n")[0]
    return f"it begins with {start!r}" if start.isprintable() else f"it begins with {head[:8]!r}"


@dataclass(frozen=True)
class _Json:
    kind: str
    first: dict[str, Any]
    is_many: bool  # more than one value, or a list
    is_list: bool


_MAY_BE_JSON = re.compile(rb"\s*(?:\[\s*(?:null\s*,\s*)*)?\{\s*[\"}]")


def _look_at_json(peeked: Peeked, text_field: str) -> _Json | None:
    """What JSON the content begins with, None if it is none."""
    head = peeked.head(LOOK_BYTES)
    may_be_json = _MAY_BE_JSON.match(head.removeprefix(BOM)) is not None
    found = _first_values(peeked, text_field) if may_be_json else None
    return found or _damaged_lines(peeked, text_field, is_likely=may_be_json)


def _first_values(peeked: Peeked, text_field: str) -> _Json | None:
    """What is found where values follow one another and the first object is whole."""
    values: list[bytes] = []
    is_many = False
    for value, reason in json_values(without_bom(peeked.growing(MAX_DOCUMENT_BYTES))):
        if reason == NOT_JSON:
            return None
        is_many = bool(values) or reason is not None
        values += [value] if value not in (None, b"null") else []
        enough = len(values) >= _LOOK_VALUES or sum(map(len, values)) > CHUNK_BYTES
        if reason or (enough and is_many):
            break
    if not values or _object(values[0]) is None:
        return None
    head = peeked.head(LOOK_BYTES)
    is_list = head.removeprefix(BOM).lstrip().startswith(b"[")
    end = head.index(b"{") + len(values[0])
    follows = peeked.head(end + LOOK_BYTES)[end:].lstrip(b" \t\r")
    is_line = b"\n" not in values[0] and (not follows or follows.startswith(b"\n"))
    objects = [decoded for value in values if (decoded := _object(value)) is not None]
    return _Json(
        kind="json" if is_list or not is_line else "jsonl",
        first=_with_field(objects, text_field),
        is_many=is_list or is_many,
        is_list=is_list,
    )


def _damaged_lines(peeked: Peeked, text_field: str, *, is_likely: bool) -> _Json | None:
    """JSON lines among others, such as a damaged or odd first line; None if it is not so.

    Args:
        is_likely: the content begins as JSON does, so that two whole lines tell. Else half of the
            lines must be objects, with the text in one of them.
    """
    head = peeked.head(CHUNK_BYTES + 1)
    lines = head.split(b"\n")
    lines = [line for line in (lines if len(head) <= CHUNK_BYTES else lines[:-1]) if line.strip()]
    objects = [decoded for line in lines if (decoded := _object(line))]
    if len(objects) < 2:
        return None
    first = _with_field(objects, text_field)
    has_text = isinstance(find_field(first, text_field), str)
    if not is_likely and not (has_text and 2 * len(objects) >= len(lines)):
        return None
    return _Json(kind="jsonl", first=first, is_many=True, is_list=False)


def _with_field(objects: list[dict[str, Any]], text_field: str) -> dict[str, Any]:
    """The object that stands for all: one with a text in the field, if the first or half of them
    have it; else the first that has the field or any text; else the first."""
    with_text = [one for one in objects if isinstance(find_field(one, text_field), str)]
    if with_text and (with_text[0] is objects[0] or 2 * len(with_text) >= len(objects)):
        return with_text[0]
    return next((one for one in objects if string_fields(one) or text_field in one), objects[0])


def _object(data: bytes) -> dict[str, Any] | None:
    data = data.strip()
    if not data.startswith(b"{"):
        return None
    try:
        decoded = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) else None


def _text_or_json(look: _Json | None, named: bool, text_field: str) -> Found:
    if look is None:
        return Found(kind="text")
    text = find_field(look.first, text_field)
    has_field = text_field in look.first or text is not None
    # Lines with something else in the field are bad documents; a list of such is another program's.
    if isinstance(text, str) or (has_field and look.is_many and (text is None or not look.is_list)):
        return Found(kind=look.kind)
    names = string_fields(look.first)
    if not look.is_many or not names:
        return Found(kind="text")
    hint = f"{LABELS[look.kind]} without a field `{text_field}`{text_field_hint(names)}"
    if look.is_list and not named:
        return Found(kind="text", hint=hint)
    remedies = "or take files as they are with --format text; another field needs another store"
    return _left_out(f"{hint}, {remedies}", is_fatal=True)
