"""Who may ask: keys, names of the host, origins. Pure ASGI; whatever is not open needs a key."""

import hmac
import ipaddress
import re
import secrets
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meshlm.core.errors import UsageError
from meshlm.serving.http.refusals import refuse
from meshlm.serving.metrics import Metrics

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
STATIC = "/static/"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9, _-]{0,1000}")


def is_open(scope: Scope) -> bool:
    """Returns whether anybody may ask this: health and the page's files, nothing else."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(STATIC))


class Keys:
    """API keys. Asked about a key, it takes as long whichever of them it is like."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Keeps digests of the keys.

        Raises:
            UsageError: a key is empty, or has a space or a control character in it.
        """
        self._secret = secrets.token_bytes(32)
        for key in keys:
            if not key or any(c.isspace() or not c.isprintable() for c in key):
                raise UsageError("an API key is empty or has spaces in it: give visible characters")
        self._digests = [self._digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def accept(self, given: bytes) -> bool:
        """Returns whether `given` is one of the keys. Digests are of one length, all compared."""
        digest, found = self._digest(given), False
        for wanted in self._digests:
            found |= hmac.compare_digest(digest, wanted)
        return found

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")


class KeyGuard:
    """Answers 401 to whoever has none of the keys, on every route that is not open."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        """Guards `app`; without any keys it lets everybody pass."""
        self.app, self.keys, self.metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if not self.keys or is_open(scope) or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        self.metrics.rejected("unauthorized")
        await refuse(
            send,
            401,
            "No valid API key: send one of the server's as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return self.keys.accept(key.strip(b" ")) & (scheme.lower() == b"bearer")


class HostGuard:
    """Refuses what a page of another site makes a browser send to this server.

    Such a page can point a name of its own at 127.0.0.1 (then the Host header has that name), and
    it can post to any address without asking first (then the Origin header is its own).
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] | None,
        origins: Collection[str],
        metrics: Metrics,
    ) -> None:
        """Guards `app`. Only these `hosts` and loopback names may be asked for; None: any name."""
        self.app, self.metrics, self.origins = app, metrics, origins
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        headers = Headers(scope=scope)
        problem = None
        if scope["path"] not in ("/health", "/ready"):
            problem = self._of_host(headers) or self._of_origin(scope["method"], headers)
        if problem is None:
            await self.app(scope, receive, send)
            return
        self.metrics.rejected("forbidden_host")
        await refuse(send, 403, problem, code="forbidden_host")

    def _of_host(self, headers: Headers) -> str | None:
        # HTTP/1.0 has no Host header, and no browser speaks it.
        host = headers.get("host")
        if self.hosts is None or host is None:
            return None
        name = host_name(host)
        if name in self.hosts or is_loopback(name):
            return None
        return "This Host header is not one of the server's: start it with --allowed-host NAME."

    def _of_origin(self, method: str, headers: Headers) -> str | None:
        origin = headers.get("origin")
        if method in _SAFE_METHODS or origin is None or _allows(self.origins, origin):
            return None
        site = headers.get("sec-fetch-site")
        same = site == "same-origin" if site else _netloc(origin) == headers.get("host", "")
        if same:
            return None
        return "Pages of this Origin may not ask: start the server with --cors-origin ORIGIN."


class Cors:
    """Lets pages of some origins read the answers. No cookies are used, so none are allowed."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        """Adds the headers to answers of `app`. An origin is exact, as https://example.org, or *.

        Raises:
            UsageError: an origin is neither.
        """
        self.app, self.origins = app, origins
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UsageError(f"--cors-origin {origin}: give scheme and host, or *")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None or not _allows(self.origins, origin):
            await self.app(scope, receive, send)
            return
        allowed = {"access-control-allow-origin": "*" if "*" in self.origins else origin}
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(send, headers, allowed)
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                out.update(allowed)
                out["access-control-expose-headers"] = "x-request-id, retry-after"
                out.add_vary_header("origin")
            await send(message)

        await self.app(scope, receive, send_allowed)


async def _preflight(send: Send, headers: Headers, allowed: dict[str, str]) -> None:
    wanted = headers.get("access-control-request-headers", "")
    answer = {
        **allowed,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": wanted if _HEADER_NAMES.fullmatch(wanted) else "",
        "access-control-max-age": "600",
        "vary": "origin",
    }
    start = {"type": "http.response.start", "status": 204, "headers": Headers(answer).raw}
    await send(start)
    await send({"type": "http.response.body"})


def host_name(host: str) -> str:
    """Returns the name in a Host header: without the port, in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def is_loopback(name: str) -> bool:
    """Returns whether a name or address can only mean this machine."""
    name = name.lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _allows(origins: Collection[str], origin: str) -> bool:
    return "*" in origins or origin in origins


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
