"""Answers of the server's own, given before the API's routes see a request: OpenAI's error body."""

import json
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import Send

from meshlm.serving.errors import error_body, error_headers

LINGER_S = 0.5
"""How long a connection stays after an answer that came before the request's end: closed at once,
with bytes of the request unread, the client would lose the answer too."""


def answer(
    status: int, content: Mapping, headers: Mapping[str, str] | None = None
) -> tuple[dict, bytes]:
    """Returns the start of a response and its body, in JSON."""
    body = json.dumps(content).encode()
    raw = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    start = {"type": "http.response.start", "status": status, "headers": Headers(raw).raw}
    return start, body


async def refuse(
    send: Send,
    status: int,
    message: str,
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Sends an error as the whole answer."""
    start, body = answer(
        status,
        error_body(status, message, code=code),
        {**error_headers(status), **(headers or {})},
    )
    await send(start)
    await send({"type": "http.response.body", "body": body})
