"""What every request passes before the routes and every answer after them. Pure ASGI."""

import asyncio
import dataclasses
import re
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshlm.serving.config import Limits
from meshlm.serving.errors import BUSY_RETRY_S, bug, error_body, error_headers
from meshlm.serving.http.guards import Cors, HostGuard, KeyGuard, Keys, is_open
from meshlm.serving.http.logs import LineLog, describe
from meshlm.serving.http.refusals import LINGER_S, answer, refuse
from meshlm.serving.metrics import Metrics

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
_SANE_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")
_MOST_PATH = 256
_NO_ANSWER = 499


def protect(
    app: ASGIApp,
    limits: Limits,
    metrics: Metrics,
    *,
    keys: Keys,
    hosts: Collection[str] | None,
    origins: Collection[str] = (),
    draining: Callable[[], bool] = lambda: False,
    log: LineLog | None = None,
) -> ASGIApp:
    """Returns `app` behind all of it.

    Args:
        app: the routes.
        limits: of bodies and their time.
        metrics: where refusals are counted.
        keys: any of them is asked for on every route but the open ones; none: nobody is asked.
        hosts: names, beside loopback ones, that the Host header may have; None: any.
        origins: of pages that may ask; * for all.
        draining: whether the server is about to end.
        log: takes a line a request.
    """
    app = BodyLimit(app, limits, metrics)
    app = DrainGate(app, draining, metrics)
    app = KeyGuard(app, keys, metrics)
    app = Cors(app, origins)
    app = HostGuard(app, hosts, origins, metrics)
    return RequestLog(app, metrics, log)


class RequestLog:
    """Names each request, writes a line of it, and adds the headers that every answer has.

    The line has no query, no headers and no body: prompts and keys are in none of the rest.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log: LineLog | None) -> None:
        """Goes around `app`; without a log it writes nothing."""
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request. Whatever is raised before an answer began becomes a 500."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        watched = _Watched(send, _request_id(scope))
        scope.setdefault("state", {})["request_id"] = watched.request_id
        try:
            await self.app(scope, receive, watched.send)
        except Exception as error:
            self._write("failed", id=watched.request_id, **describe(error))
            if watched.status:
                # The routes have answered with a 500, or it is too late to: the connection is cut.
                raise
            await refuse(watched.send, 500, str(bug()))
        finally:
            self._ended(scope, watched)

    def _ended(self, scope: Scope, watched: "_Watched") -> None:
        status = watched.status or _NO_ANSWER
        self.metrics.responded(status)
        if status < 400 and scope["path"].startswith("/static/"):
            return  # some forty a visit, and they say nothing
        client = scope.get("client")
        self._write(
            "request",
            id=watched.request_id,
            client=client[0] if client else None,
            method=scope["method"][:16],
            path=scope["path"][:_MOST_PATH],
            status=status,
            ms=round((time.monotonic() - watched.started_s) * 1000, 1),
            bytes_out=watched.bytes_out,
        )

    def _write(self, event: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.write(event, **fields)


class _Watched:
    """The way back of one request."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0
        self.bytes_out = 0
        self.started_s = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


class DrainGate:
    """Answers 503 once the server is about to end; health and the page's files still come."""

    def __init__(self, app: ASGIApp, draining: Callable[[], bool], metrics: Metrics) -> None:
        """Guards `app` while `draining()`."""
        self.app, self.draining, self.metrics = app, draining, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if not self.draining() or is_open(scope) or scope["path"] == "/metrics":
            await self.app(scope, receive, send)
            return
        self.metrics.rejected("draining")
        message = "The server is stopping and takes no more requests: try again soon."
        await refuse(send, 503, message, code="draining", headers={"connection": "close"})


class BodyLimit:
    """Reads the body before the routes do: not more than the limit, not longer than its time.

    All bodies together have a bound too, each from its first byte to the end of its request.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        """Guards `app`."""
        self.app, self.limits, self.metrics = app, limits, metrics
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request. What Content-Length says may be a lie: the bytes are counted."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length == "0" and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        if not length.isdecimal() or int(length[:20]) > self.limits.max_body_bytes:
            await self._refuse("too_large", send)
            return
        body = _Body()
        try:
            reason = await self._read(body, receive)
            if reason is None:
                await self.app(scope, _replayed(body, receive), send)
        finally:
            self._held_bytes -= body.size
        if reason is not None and reason != "gone":
            await self._refuse(reason, send)

    async def _read(self, body: "_Body", receive: Receive) -> str | None:
        """Returns why the body is not taken, None where it came whole."""
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return "gone"
                    part = message.get("body", b"")
                    body.data += part
                    body.size += len(part)
                    self._held_bytes += len(part)
                    if body.size > self.limits.max_body_bytes:
                        return "too_large"
                    if self._held_bytes > self.limits.max_bodies_bytes:
                        return "bodies"
                    if not message.get("more_body"):
                        return None
        except TimeoutError:
            return "slow"

    async def _refuse(self, reason: str, send: Send) -> None:
        self.metrics.rejected(reason)
        limits = self.limits
        if reason == "slow":
            message = f"The request's body took over {limits.body_timeout_s:g} s to arrive."
            await _refuse_early(send, 408, message)
        elif reason == "bodies":
            message = "The bodies of all requests now are too much memory: try again soon."
            await _refuse_early(send, 503, message, code="too_many_bodies")
        else:
            message = f"The request's body is over {limits.max_body_bytes:,} bytes: send less."
            await _refuse_early(send, 413, message)


@dataclasses.dataclass
class _Body:
    """What came of a body."""

    data: bytearray = dataclasses.field(default_factory=bytearray)
    size: int = 0
    """How long it is, also when the routes have taken it."""


def _replayed(body: _Body, receive: Receive) -> Receive:
    """Gives the whole body once, then what comes after it: that the client went away."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        data = bytes(body.data)
        body.data.clear()
        return {"type": "http.request", "body": data, "more_body": False}

    return replayed


async def _refuse_early(send: Send, status: int, message: str, *, code: str | None = None) -> None:
    """Answers while the client still sends, and closes; see LINGER_S."""
    headers = {**error_headers(status, retry_after_s=BUSY_RETRY_S), "connection": "close"}
    start, body = answer(status, error_body(status, message, code=code), headers)
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await asyncio.sleep(LINGER_S)
    await send({"type": "http.response.body", "body": b""})
