"""A request's body to a JSON object, within bounds: what is no plain JSON is refused cheaply."""

import re
from collections.abc import AsyncIterator
from email.message import Message
from typing import Any

from starlette.requests import ClientDisconnect, Request

from meshlm.core import strict_json
from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError, bad_field

# Lists and objects; prompts come on top.
MAX_CONTAINERS = 4096
# Commas outside of texts; the prompts' token ids come on top.
MAX_VALUES = 16384
# Fields of one object.
MAX_KEYS = 8192

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
    _check_bounds(body, MAX_CONTAINERS + limits.max_prompts, MAX_VALUES + more_values)
    try:
        value = strict_json.parse_object(
            body,
            "the request body",
            max_bytes=limits.max_body_bytes,
            max_keys=max(MAX_KEYS, limits.max_logit_bias),
        )
    except strict_json.JsonError as error:
        raise _RefusalError(error.why) from None
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
