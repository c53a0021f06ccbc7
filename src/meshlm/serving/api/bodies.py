"""A request's body to a JSON object, within bounds: what is no plain JSON is refused cheaply."""

import codecs
import functools
import json
import math
import re
from collections.abc import AsyncIterator
from email.message import Message
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError, bad_field

MAX_DEPTH = 32
# Lists and objects; prompts come on top.
MAX_CONTAINERS = 4096
# Commas outside of texts; the prompts' token ids come on top.
MAX_VALUES = 16384
# Fields of one object.
MAX_KEYS = 8192

_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _RefusalError(ValueError):
    """Why the body is no JSON that is taken."""


async def read_object(request: Request, limits: Limits, context_length: int) -> dict[str, Any]:
    """Returns the JSON object that a request carries.

    Raises:
        ApiError: 413 for a body that is too long, else 400: another content type, no UTF-8, no
            JSON, a number that is none, a key twice, too deep, too many values, no object.
    """
    _check_content_type(request)
    body = await _read(request.stream(), limits.max_body_bytes)
    try:
        return parse_object(body, limits, context_length)
    except _RefusalError as error:
        raise bad_field(None, f"the request body {error}: send a JSON object") from None


def parse_object(body: bytes, limits: Limits, context_length: int) -> dict[str, Any]:
    """Returns the JSON object in `body`; raises ValueError, with why, where there is none."""
    more_values = limits.max_prompts * context_length
    # A byte-order mark before the object says UTF-8, and is no part of it.
    body = body.removeprefix(codecs.BOM_UTF8)
    _check_bounds(body, MAX_CONTAINERS + limits.max_prompts, MAX_VALUES + more_values)
    max_keys = max(MAX_KEYS, limits.max_logit_bias)
    try:
        value = json.loads(
            body.decode(),
            object_pairs_hook=functools.partial(_unique, max_keys),
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
    except UnicodeDecodeError as error:
        raise _RefusalError(f"is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _RefusalError(f"is not JSON ({error.msg} at {place})") from None
    except _RefusalError:
        raise
    except (ValueError, RecursionError):
        raise _RefusalError("holds a number of thousands of digits") from None
    if not isinstance(value, dict):
        raise _RefusalError(f"is {_kind(value)}")
    if _SURROGATE.search(body):
        _check_text(value)
    return value


def _check_content_type(request: Request) -> None:
    header = request.headers.get("content-type", "")
    message = Message()
    message["content-type"] = header
    kind = message.get_content_type() if header else ""
    if kind != "application/json":
        raise bad_field(
            None,
            f"the content type is {header[:80]!r}: send JSON with Content-Type: application/json",
        )
    charset = message.get_param("charset", "utf-8")
    if str(charset).lower() not in ("utf-8", "utf8"):
        raise bad_field(None, f"the body's charset is {str(charset)[:40]!r}: send UTF-8")


async def _read(stream: AsyncIterator[bytes], most: int) -> bytes:
    body = bytearray()
    try:
        async for part in stream:
            body += part
            if len(body) > most:
                raise ApiError(
                    413,
                    f"the request body has more than {most} bytes: send a shorter one",
                    reason="too_large",
                )
    except ClientDisconnect:
        raise ApiError(400, "the connection ended before the body did") from None
    return bytes(body)


def _check_bounds(body: bytes, max_containers: int, max_values: int) -> None:
    """Looks at brackets and commas outside of texts, before anything is built."""
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 4 * max_values:  # a key and a text, with two each
        raise _RefusalError(f"holds more than {max_values} values")
    bare = b"".join(body.split(b'"')[::2])
    containers = bare.count(b"[") + bare.count(b"{")
    if containers > max_containers or bare.count(b"]") + bare.count(b"}") > max_containers:
        raise _RefusalError(f"holds more than {max_containers} lists and objects")
    if bare.count(b",") > max_values:
        raise _RefusalError(f"holds more than {max_values} values")
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _RefusalError(f"is nested more than {MAX_DEPTH} deep")


def _unique(most: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > most:
        raise _RefusalError(f"holds an object of more than {most} fields")
    found = dict(pairs)
    if len(found) != len(pairs):
        keys: set[str] = set()
        for key, _ in pairs:
            if key in keys:
                raise _RefusalError(f"names {key[:80]!r} twice")
            keys.add(key)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusalError(f"holds {text[:40]}, which is beyond a float")
    return value


def _not_a_number(text: str) -> NoReturn:
    raise _RefusalError(f"holds {text}, which JSON has not")


def _check_text(value: Any) -> None:
    """Raises where a text somewhere in `value` has a lone surrogate, which no UTF-8 holds."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise _RefusalError(f"has a lone surrogate, U+{code:04X}, in a text") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return {str: "a text", list: "a list"}.get(type(value), "a number")
