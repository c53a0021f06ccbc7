"""The guards around every route, driven as pure ASGI with an app that only says that it ran."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.core.errors import UsageError
from meshlm.serving.config import Limits
from meshlm.serving.http import middleware
from meshlm.serving.http.guards import Keys, host_name, is_loopback
from meshlm.serving.http.logs import LineLog
from meshlm.serving.http.middleware import CONTENT_SECURITY_POLICY, protect
from meshlm.serving.metrics import Metrics

LIMITS = Limits(max_body_bytes=1000, body_timeout_s=0.1)
NO_KEYS = Keys(())


class App:
    """Answers 200 with the body it was given; counts how often it was asked."""

    def __init__(self, error: Exception | None = None, *, late: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.after: list[str] = []
        self.error, self.late = error, late

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.bodies.append(message["body"])
        if self.error is not None and not self.late:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes", "more_body": self.late})
        if self.error is not None:
            raise self.error
        self.after.append((await receive())["type"])


class Answer:
    """What came back, and how much of the request was taken before."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.taken = 0
        self.whole = False

    @property
    def error(self) -> dict:
        return json.loads(self.body)["error"]

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.whole = not message.get("more_body")


def ask(
    app,
    path: str = "/v1/models",
    headers: Iterable[tuple[str, str]] = (),
    *,
    method: str = "GET",
    chunks: Iterable[bytes] = (),
    stalls: bool = False,
) -> Answer:
    """One request. After the chunks the client goes away, or with `stalls` sends nothing more."""
    answer = Answer()
    pieces = list(chunks)
    messages = [
        {"type": "http.request", "body": piece, "more_body": stalls or i + 1 < len(pieces)}
        for i, piece in enumerate(pieces or [b""])
    ]

    async def receive():
        if messages:
            answer.taken += len(messages[0]["body"])
            return messages.pop(0)
        if stalls:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    names = [(k.lower().encode(), v.encode("utf-8")) for k, v in headers]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": names,
        "client": ("127.0.0.1", 5),
    }
    asyncio.run(app(scope, receive, answer.send))
    return answer


def protected(app, **changes):
    settings = {"keys": NO_KEYS, "hosts": None, **changes}
    return protect(app, settings.pop("limits", LIMITS), Metrics(), **settings)


# Keys.


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-on",
        "Bearer sk-one2",
        "Bearer sk-onesk-two",
        "sk-one",
        "Basic sk-one",
        "Bearer ключ2",
        "Bearer sk-öne",
    ],
)
def test_whoever_has_no_key_is_refused(given):
    app = App()
    headers = [] if given is None else [("Authorization", given)]
    answer = ask(protected(app, keys=Keys(["sk-one", "sk-two", "ключ"])), headers=headers)
    assert (answer.status, app.bodies) == (401, [])
    assert answer.error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    assert "sk-" not in answer.body.decode()


@pytest.mark.parametrize(
    "given", ["Bearer sk-one", "bearer sk-two", "BEARER  sk-two ", "Bearer ключ"]
)
def test_each_key_opens(given):
    answer = ask(
        protected(App(), keys=Keys(["sk-one", "sk-two", "ключ"])),
        headers=[("Authorization", given)],
    )
    assert answer.status == 200


def test_two_keys_at_once_are_none():
    headers = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer right")]
    assert ask(protected(App(), keys=Keys(["right"])), headers=headers).status == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/health", 200),
        ("HEAD", "/ready", 200),
        ("GET", "/static/app.js", 200),
        ("POST", "/health", 401),
        ("POST", "/static/app.js", 401),
        ("GET", "/health/", 401),
        ("GET", "//health", 401),
        ("GET", "/staticx", 401),
        ("GET", "/static", 401),
        ("GET", "/metrics", 401),
        ("GET", "/openapi.json", 401),
        ("GET", "/nowhere", 401),
        ("OPTIONS", "/", 401),
    ],
)
def test_only_health_and_the_page_are_open(method, path, status):
    answer = ask(protected(App(), keys=Keys(["k"])), path, method=method)
    assert answer.status == status


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "\x00", "a\u200b"])
def test_keys_are_visible_characters(key):
    with pytest.raises(UsageError, match="API key"):
        Keys(["good", key])


@given(keys=st.lists(st.text("ab", min_size=1, max_size=3), max_size=4), tried=st.text("ab"))
def test_a_key_is_one_of_the_keys(keys, tried):
    assert Keys(keys).accept(tried.encode()) == (tried in keys)


# Bodies.


@pytest.mark.parametrize("chunks", [[b"x" * 1000], [b"x"] * 1000, [b"x" * 999, b"", b"x"]])
def test_a_body_at_the_limit_passes_whole(chunks):
    app = App()
    headers = [("Transfer-Encoding", "chunked")]
    assert ask(protected(app), method="POST", headers=headers, chunks=chunks).status == 200
    assert app.bodies == [b"x" * 1000]
    assert app.after == ["http.disconnect"]


@pytest.mark.parametrize(
    "headers", [[("Transfer-Encoding", "chunked")], [("Content-Length", "10")]]
)
def test_a_body_that_never_ends_is_read_to_the_limit(headers, monkeypatch):
    monkeypatch.setattr(middleware, "LINGER_S", 0)
    app = App()
    answer = ask(protected(app), method="POST", headers=headers, chunks=[b"x" * 100] * 10_000)
    assert (answer.status, app.bodies) == (413, [])
    assert answer.taken == 1100
    assert answer.error["message"] == "The request's body is over 1,000 bytes: send less."
    assert (answer.headers["connection"], answer.whole) == ("close", True)


@pytest.mark.parametrize("length", ["1001", "1" * 5000, "-1", "x", "²"])
def test_a_declared_body_is_refused_unread(length):
    headers = [("Content-Length", length)]
    answer = ask(protected(App()), method="POST", headers=headers, chunks=[b"x" * 100] * 20)
    assert (answer.status, answer.taken) == (413, 0)


def test_bodies_of_all_requests_are_bounded(monkeypatch):
    """Two fit, begun or given to a route; the third does not until one of them is over."""
    monkeypatch.setattr(middleware, "LINGER_S", 0)
    limits = Limits(max_body_bytes=1000, max_bodies_bytes=2000)
    metrics = Metrics()
    headers = [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}

    async def check():
        over = asyncio.Event()

        async def app(scope, receive, send):
            assert (await receive())["body"] == b"x" * 1000
            await over.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"yes"})

        served = protect(app, limits, metrics, keys=NO_KEYS, hosts=None)

        async def visit(answer, *, stalls):
            messages = [{"type": "http.request", "body": b"x" * 1000, "more_body": stalls}]

            async def receive():
                if messages:
                    return messages.pop()
                await over.wait()
                return {"type": "http.disconnect"}

            await served(dict(scope), receive, answer.send)

        first, second, third, fourth = (Answer() for _ in range(4))
        visits = [
            asyncio.create_task(visit(first, stalls=False)),
            asyncio.create_task(visit(second, stalls=True)),
        ]
        await asyncio.sleep(0)
        await visit(third, stalls=False)
        assert (third.status, third.error["code"]) == (503, "too_many_bodies")
        assert third.headers["retry-after"] == "1"
        over.set()
        await asyncio.gather(*visits)
        assert (first.status, second.status) == (200, 0)
        await visit(fourth, stalls=False)
        assert fourth.status == 200

    asyncio.run(check())
    assert b'rejected_total{reason="bodies"} 1.0' in metrics.render()


def test_one_body_fits_into_all():
    with pytest.raises(UsageError, match=r"--max-bodies-bytes 999: .* --max-body-bytes 1000"):
        Limits(max_body_bytes=1000, max_bodies_bytes=999)


def test_a_slow_body_is_given_up():
    begin = time.monotonic()
    headers = [("Content-Length", "10")]
    answer = ask(protected(App()), method="POST", headers=headers, chunks=[b"x"], stalls=True)
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert time.monotonic() - begin < 2


def test_a_client_that_leaves_in_its_body_gets_nothing():
    app = App()

    async def receive():
        return {"type": "http.disconnect"}

    answer = Answer()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": [(b"content-length", b"10")]}
    asyncio.run(protected(app)(scope, receive, answer.send))
    assert (answer.status, app.bodies) == (0, [])


# Hosts and origins.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LocalHost.:8000", 200),
        ("box.localhost:1", 200),
        ("[::1]:8000", 200),
        ("127.9.9.9", 200),
        ("chat.example.org", 200),
        ("rebound.example.com", 403),
        ("127.0.0.1.example.com", 403),
        ("localhost.example.com:8000", 403),
        ("example.org", 403),
        ("0.0.0.0:8000", 403),
        ("", 403),
    ],
)
def test_a_local_server_answers_to_its_own_names(host, status):
    app = protected(App(), hosts=["Chat.Example.org"])
    assert ask(app, headers=[("Host", host)]).status == status
    assert ask(app, "/health", headers=[("Host", host)]).status == 200


@given(st.text(max_size=20))
def test_any_host_header_has_a_name(host):
    assert is_loopback(host_name(host)) in (True, False)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "http://127.0.0.1:3000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Origin": "https://ok.example", "Sec-Fetch-Site": "cross-site"}, 200),
        # Behind a proxy that does not pass the Host header on.
        ({"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_may_not_post(headers, status):
    app = protected(App(), origins=["https://ok.example"])
    given = [("Host", "127.0.0.1:8000"), *headers.items()]
    assert ask(app, "/v1/completions", given, method="POST").status == status
    assert ask(app, "/v1/models", given, method="GET").status == 200


def test_origins_that_were_asked_for_may_read():
    app = protected(App(), origins=["https://ok.example"], keys=Keys(["k"]))
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    before = ask(app, headers=[("Origin", "https://ok.example"), *asks.items()], method="OPTIONS")
    assert before.status == 204
    assert before.headers["access-control-allow-origin"] == "https://ok.example"
    assert before.headers["access-control-allow-headers"] == asks["Access-Control-Request-Headers"]
    # An error has the headers too: else the page could not tell what went wrong.
    after = ask(app, headers=[("Origin", "https://ok.example")])
    assert (after.status, after.headers["vary"]) == (401, "origin")
    assert after.headers["access-control-allow-origin"] == "https://ok.example"
    for answer in (before, after):
        assert "access-control-allow-credentials" not in answer.headers
    other = ask(app, headers=[("Origin", "https://no.example"), *asks.items()], method="OPTIONS")
    assert other.status == 401
    assert not [name for name in other.headers if name.startswith("access-control")]


def test_no_origin_may_read_unless_asked_for():
    answer = ask(protected(App()), headers=[("Origin", "https://ok.example")])
    assert not [name for name in answer.headers if name.startswith("access-control")]
    star = ask(protected(App(), origins=["*"]), headers=[("Origin", "https://ok.example")])
    assert star.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://", "", "**"])
def test_origins_are_exact(origin):
    with pytest.raises(UsageError, match="--cors-origin"):
        protected(App(), origins=[origin])


# What all have.


def test_headers_of_every_answer():
    for answer in (ask(protected(App())), ask(protected(App(), keys=Keys(["k"])))):
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("é", False)],
)
def test_request_ids(given, kept):
    answer = ask(protected(App()), headers=[("X-Request-Id", given)])
    assert (answer.headers["x-request-id"] == given) == kept
    assert answer.headers["x-request-id"]


def test_a_server_that_stops_refuses_all_but_health():
    stopping = [False]
    app = protected(App(), draining=lambda: stopping[0])
    assert ask(app).status == 200
    stopping[0] = True
    answer = ask(app)
    assert (answer.status, answer.error["code"]) == (503, "draining")
    assert int(answer.headers["retry-after"]) > 0
    assert ask(app, "/health").status == ask(app, "/metrics").status == 200


def logged(app, *arguments, **named) -> tuple[Answer, list[dict], str]:
    stream = io.StringIO()
    log = LineLog(stream)
    answer = ask(protected(app, log=log), *arguments, **named)
    log.close()
    text = stream.getvalue()
    return answer, [json.loads(line) for line in text.splitlines()], text


def test_a_line_for_a_request_without_what_is_in_it():
    headers = [("X-Request-Id", "r1"), ("Authorization", "Bearer sk-secret")]
    headers += [("Content-Length", "9"), ("User-Agent", "\x1b[31mred\r\n")]
    answer, lines, text = logged(
        App(), "/v1/x\r\n\x1b[2J\x7f\x9b<script>", headers, method="POST", chunks=[b"my prompt"]
    )
    assert answer.status == 200
    (line,) = lines
    assert (line["id"], line["status"], line["bytes_out"]) == ("r1", 200, 3)
    assert line["path"] == "/v1/x\r\n\x1b[2J\x7f\x9b<script>"
    assert all(32 <= ord(character) < 127 for character in text.rstrip("\n"))
    assert "secret" not in text
    assert "my prompt" not in text


def test_an_error_of_ours_is_a_500_with_its_cause_in_the_log_alone():
    answer, lines, text = logged(App(ValueError("about my prompt")))
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "prompt" not in answer.body.decode() + text
    failed, request = lines
    assert (failed["error"], request["status"]) == ("ValueError", 500)
    assert "test_middleware.py" in failed["where"][-1]
    assert failed["id"] == request["id"] == answer.headers["x-request-id"]


def test_an_error_after_the_answer_began_cuts_it():
    with pytest.raises(ValueError, match="late"):
        ask(protected(App(ValueError("late"), late=True)))


def test_a_log_that_nobody_reads_stops_nobody():
    class Stuck(io.StringIO):
        def write(self, text):
            time.sleep(30)
            return len(text)

    log = LineLog(Stuck(), capacity=5)
    begin = time.monotonic()
    for _ in range(100):
        log.write("request")
    log.close(0.05)
    assert time.monotonic() - begin < 5
