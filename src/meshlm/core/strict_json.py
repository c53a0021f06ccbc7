"""JSON objects from files and from strangers, read strictly and within bounds.

Python's parser accepts more than JSON: NaN and infinities, repeated keys (the last one counts), and
any depth that fits the stack. Here each of these is an error, so two readers of a file never see
different content. All files and requests of JSON are parsed here; a test checks this.
"""

import codecs
import collections
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from meshlm.core import files
from meshlm.core.errors import BadInputError

MAX_DEPTH = 32
"""Objects and lists inside one another."""
MAX_BYTES = 64 << 20
_SHOWN_CHARACTERS = 80
# Everything up to the next bracket outside of strings, or up to the end. Possessive repeats keep no
# state for going back, which would take many times the memory of the data.
_UP_TO_BRACKET = re.compile(
    rb'(?:[^\[\]{}"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"?)*+([\[\]{}]|\Z)', re.DOTALL
)
_KINDS = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}


class JsonError(BadInputError):
    """The bytes are not an accepted JSON object.

    Attributes:
        why: a predicate, such as "is not JSON (not UTF-8 at byte 3)".
    """

    def __init__(self, where: str, why: str, remedy: str) -> None:
        super().__init__(f"{where} {why}" + (f": {remedy}" if remedy else ""))
        self.why = why


class _RefusalError(Exception):
    """Carries a predicate out of the parser."""


def parse_object(
    data: bytes,
    where: str,
    *,
    remedy: str = "",
    max_bytes: int = MAX_BYTES,
    max_keys: int | None = None,
    not_finite: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Returns the JSON object in `data`, which is UTF-8, with or without a byte-order mark.

    Args:
        where: name of the file or body, for messages.
        remedy: the end of the message.
        max_bytes: longer data is refused.
        max_keys: the most keys of one object.
        not_finite: makes a value of NaN, Infinity, -Infinity or a number beyond a float, given as
            text; without it they are refused.

    Raises:
        JsonError: `data` is too long, not UTF-8, no JSON or no object; a key occurs twice, or
            objects and lists are nested more than `MAX_DEPTH` deep.
    """
    try:
        if len(data) > max_bytes:
            raise _RefusalError(f"has more than {max_bytes:,} bytes")
        value = _parse(data.removeprefix(codecs.BOM_UTF8), max_keys, not_finite or _refuse_number)
        if not isinstance(value, dict):
            raise _RefusalError(f"is {_KINDS.get(type(value), 'a number')}, not a JSON object")
        return value
    except _RefusalError as refusal:
        raise JsonError(where, str(refusal), remedy) from None


def read_object(
    path: Path,
    *,
    remedy: str = "",
    max_bytes: int = MAX_BYTES,
    not_finite: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Returns the JSON object in a file, of which no more than `max_bytes` are read.

    Args: as `parse_object`.

    Raises:
        JsonError: as `parse_object`.
        BadInputError: the file is larger.
        UsageError: it is a named pipe or another thing without an end.
        OSError: it cannot be read.
    """
    data = files.read(path, max_bytes)
    return parse_object(data, str(path), remedy=remedy, max_bytes=max_bytes, not_finite=not_finite)


def _parse(data: bytes, max_keys: int | None, not_finite: Callable[[str], Any]) -> Any:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _RefusalError(f"is not JSON (not UTF-8 at byte {error.start})") from None
    _check_depth(data)
    try:
        return json.loads(
            text,
            object_pairs_hook=functools.partial(_unique, max_keys),
            parse_float=lambda text: _float(text, not_finite),
            parse_constant=not_finite,
        )
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise _RefusalError(f"is not JSON ({place})") from None
    except ValueError:
        raise _RefusalError("holds a number of thousands of digits") from None


def _check_depth(data: bytes) -> None:
    """Raises for deep nesting, before a value is built and before the parser's stack is full."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _UP_TO_BRACKET.finditer(data):
        depth += (match[1] in (b"[", b"{")) - (match[1] in (b"]", b"}"))
        if depth > MAX_DEPTH:
            raise _RefusalError(f"is not JSON (nested more than {MAX_DEPTH} deep)")


def _unique(most: int | None, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if most is not None and len(pairs) > most:
        raise _RefusalError(f"holds an object of more than {most} fields")
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _RefusalError(f"has the key {twice[:_SHOWN_CHARACTERS]!r} twice")
    return found


def _float(text: str, not_finite: Callable[[str], Any]) -> Any:
    value = float(text)
    return value if math.isfinite(value) else not_finite(text)


def _refuse_number(text: str) -> NoReturn:
    why = "which JSON has not" if text.isalpha() or text[1:].isalpha() else "beyond a float"
    raise _RefusalError(f"holds {text[:40]}, {why}")
