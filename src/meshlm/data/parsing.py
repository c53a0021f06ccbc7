"""Records to documents: JSON is parsed, the field with the text is found, and texts are split."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from meshlm.data.records import Record, document_key, not_utf8

_INDIRECT = re.compile(r'[."\\\x00-\x1f]')
"""In names that msgspec's structs cannot have, and in those that may go one level down."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN_CANDIDATES = 5
_SHOWN_NAME_CHARACTERS = 40


class Parser:
    """Makes documents of records.

    Args:
        text_field: name of the field that holds the text; a dot goes one level down, unless a field
            has the whole name.
        split_on: separator between the documents in one field, or None.
    """

    def __init__(self, text_field: str = "text", split_on: str | None = None) -> None:
        self._field = text_field
        self._split_on = split_on or None
        self._is_direct = not _INDIRECT.search(text_field)
        fields: list[Any] = [("text", str)]
        if text_field != "meta":
            fields.append(("meta", Any, None))
        names = {"text": text_field} if self._is_direct else None
        line = msgspec.defstruct("Line", fields, rename=names)
        decoder = msgspec.json.Decoder(line if self._is_direct else Any)
        self._decode: Callable[[bytes], Any] = decoder.decode

    def documents(self, record: Record) -> list[Record]:
        """The documents of `record`, with `text`, `key` and `set_name` filled in, or `bad`."""
        if record.line is not None and not record.bad:
            record = self._parsed(record)
        if self._split_on is None or record.bad or self._split_on not in record.text:
            return [record]
        return list(self._parts(record, self._split_on))

    def _parsed(self, record: Record) -> Record:
        try:
            line = self._decode(record.line or b"")
            if not self._is_direct:
                text, meta = text_at(line, self._field), line.get("meta")
            else:
                text, meta = line.text, getattr(line, "meta", None)
        except (ValueError, RecursionError) as error:
            return record._replace(line=None, bad=self._reason(error, record.line or b""))
        key = document_key(text)
        return record._replace(line=None, text=text, key=key, set_name=pile_set_name(meta))

    def _parts(self, record: Record, separator: str) -> Iterator[Record]:
        # A separator at the very end ends the last document and begins no other.
        texts = record.text.removesuffix(separator).split(separator)
        for part, text in enumerate(texts):
            is_first, is_last = part == 0, part == len(texts) - 1
            yield record._replace(
                text=text,
                key=document_key(text),
                part=part,
                first=record.first or not is_first,
                last=record.last or not is_last,
            )

    def _reason(self, error: Exception, line: bytes) -> str:
        if isinstance(error, UnicodeDecodeError):
            return not_utf8(error)
        if isinstance(error, RecursionError):
            return "JSON nested too deep"
        if isinstance(error, msgspec.ValidationError):
            try:
                names = string_fields(msgspec.json.decode(line))
            except (ValueError, RecursionError) as damage:
                # The typed decoder stops at the first wrong value, and what follows is no JSON.
                return self._reason(damage, line)
            return f"no text: {error}{text_field_hint(names)}"
        if _SURROGATE.search(line) and _is_json(line):
            return "a \\u escape is half of a UTF-16 pair, which is no character"
        return f"not JSON: {error}"


def _is_json(line: bytes) -> bool:
    """Whether Python's parser, which allows halves of UTF-16 pairs, takes the line."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def text_at(value: Any, field: str) -> str:
    """The text in the field of a JSON value. Raises msgspec.ValidationError if there is none."""
    found = find_field(value, field)
    if isinstance(found, str):
        return found
    if not isinstance(value, dict):
        raise msgspec.ValidationError(f"Expected `object`, got `{type(value).__name__}`")
    if found is None:
        raise msgspec.ValidationError(f"Object missing required field `{field}`")
    raise msgspec.ValidationError(f"Expected `str`, got `{type(found).__name__}` - at `$.{field}`")


def find_field(value: Any, field: str) -> Any:
    """What is in the field of a JSON value, None if it is null or not there."""
    if not isinstance(value, dict):
        return None
    if field in value or "." not in field:
        return value.get(field)
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def string_fields(value: Any) -> list[str]:
    """The names of the fields of a JSON value that hold a string, the longest string first."""
    if not isinstance(value, dict):
        return []
    found = {name: text for name, text in value.items() if isinstance(text, str)}
    for name, inner in value.items():
        if isinstance(inner, dict):
            found |= {f"{name}.{n}": text for n, text in inner.items() if isinstance(text, str)}
    return sorted(found, key=lambda name: (-len(found[name]), name))


def text_field_hint(names: list[str]) -> str:
    """What to add to a message about a missing field: the fields that there are."""
    if not names:
        return ""
    shown = [
        name if len(name) <= _SHOWN_NAME_CHARACTERS else name[: _SHOWN_NAME_CHARACTERS - 3] + "..."
        for name in names[:_SHOWN_CANDIDATES]
    ]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    listed = ", ".join(f"`{name}`" for name in shown)
    return f"; there is text in {listed}{more}: choose with --text-field"


def pile_set_name(meta: object) -> str | None:
    """`pile_set_name` in a document's `meta`, or None."""
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else None
