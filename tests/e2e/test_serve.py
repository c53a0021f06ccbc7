"""`meshlm serve` as a process: who may ask, what is too much, how it begins and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from meshlm.serving.config import EngineConfig, Limits
from meshlm.serving.engine import Engine
from meshlm.serving.http.guards import OPEN_PATHS
from meshlm.serving.http.server import Condition, ServeOptions, make_app
from meshlm.serving.metrics import Metrics
from runs import one_line
from servers import Server, events, write_checkpoint

pytestmark = pytest.mark.timeout(300)
KEYS = ("sk-first-0123", "sk-ключ")
KEY = {"Authorization": f"Bearer {KEYS[0]}"}
# Bounds that a test can wait for; sizes that compile soon.
SMALL = ("--slots", "2", "--prefill-chunk", "32", "--max-queue", "8")
HASTY = ("--header-timeout-s", "1", "--body-timeout-s", "1", "--idle-timeout-s", "2")
MAX_BODY = 100_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def guarded(weights, compiled, tmp_path_factory) -> Iterator[Server]:
    """A server that wants a key, gives little time, and takes small bodies."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# two of them\n{KEYS[0]}\n\n")
    options = (*SMALL, *HASTY, "--api-key-file", str(keys), "--max-body-bytes", str(MAX_BODY))
    environment = {**compiled, "MESHLM_API_KEY": KEYS[1]}
    with Server(weights, *options, environment=environment) as server:
        yield server.wait_ready()


def complete(server: Server, headers=KEY, **fields) -> httpx.Response:
    body = {"prompt": "the quick", "max_tokens": 3, "seed": 1, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            found += data
    return found


def answer_with_body(connection: socket.socket) -> bytes:
    """An answer whose body is a JSON object, on a connection that stays open."""
    found = b""
    while not found.endswith(b"}"):
        data = connection.recv(65536)
        assert data, found
        found += data
    return found


# Who may ask.


def test_every_route_but_health_and_the_page_wants_the_key(guarded):
    engine = Engine(lambda: None, EngineConfig())  # type: ignore[arg-type]
    options = ServeOptions(model_id="tiny", fingerprint="fp")
    app = make_app(engine, options, Metrics(), Condition(engine))
    asked = {(m, r.path) for r in app.routes for m in r.methods}  # type: ignore[attr-defined]
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/openapi.json")} <= asked
    assert len(asked) > 15
    closed = set()
    with httpx.Client(base_url=guarded.url) as client:
        for method, path in asked:
            told = client.request(method, path.replace("{", "").replace("}", ""))
            if told.status_code == 401:
                closed.add((method, path))
                assert method == "HEAD" or told.json()["error"]["code"] == "invalid_api_key"
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "BREW"):
            assert client.request(method, "/v1/completions").status_code == 401
    open_paths = {*OPEN_PATHS, "/static/{name}"}
    assert asked - closed == {(m, p) for p in open_paths for m in ("GET", "HEAD")}


@pytest.mark.parametrize(
    "given", ["sk-first", "sk-first-01234", "sk-wrong", "sk-ключи", "\xff\xfe"]
)
def test_keys_that_are_none(guarded, given):
    told = complete(guarded, {b"Authorization": b"Bearer " + given.encode()})
    assert told.status_code == 401
    assert not any(key in told.text for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_keys_from_the_file_and_the_environment(guarded, key):
    told = complete(guarded, {b"Authorization": b"Bearer " + key.encode()})
    assert told.status_code == 200, told.text
    assert told.headers["x-request-id"]


def test_other_names_of_the_host_are_refused(guarded):
    assert complete(guarded, {**KEY, "Host": f"localhost:{guarded.port}"}).status_code == 200
    assert complete(guarded, {**KEY, "Host": "rebound.example"}).status_code == 403
    assert complete(guarded, {**KEY, "Origin": "https://other.example"}).status_code == 403


# The page's files.


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../etc/passwd",
        "/static/..%2f..%2fetc%2fpasswd",
        "/static/%2e%2e/%2e%2e/pages.py",
        "/static/..%5cpages.py",
        "/static//etc/passwd",
        "/static/%00",
        "/static/",
        "/static/__init__.py",
        "/static/index.html/",
    ],
)
def test_only_the_pages_files_are_given(guarded, path):
    with guarded.connected() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{line(KEY)}".encode())
        told = answer(connection)
    assert told.startswith((b"HTTP/1.1 404", b"HTTP/1.1 401"))
    assert b"root:" not in told
    assert b"import" not in told


def line(headers: dict[str, str]) -> str:
    return "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "Connection: close\r\n\r\n"


def test_the_page_comes_whole_and_once(guarded):
    page = httpx.get(guarded.url)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    again = httpx.get(guarded.url, headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = httpx.head(guarded.url)
    assert (head.status_code, head.headers["etag"]) == (200, page.headers["etag"])


def test_a_model_that_is_a_path_is_no_model(guarded):
    told = complete(guarded, model="../../etc/passwd")
    assert (told.status_code, told.json()["error"]["code"]) == (404, "model_not_found")


# Too much, too slow.


def test_a_huge_body_is_refused_before_it_is_read(guarded):
    with guarded.connected() as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {100 << 20}\r\n"
        )
        connection.sendall(f"{head}Authorization: {KEY['Authorization']}\r\n\r\n".encode())
        assert answer(connection).startswith(b"HTTP/1.1 413")


def test_a_huge_body_in_chunks_is_read_to_the_limit(guarded):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    with guarded.connected() as connection:
        connection.sendall(f"{head}Authorization: {KEY['Authorization']}\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100 << 20:
                connection.sendall(chunk)
                sent += len(chunk)
        # What was sent is what the kernel's buffers took: nobody reads on.
        assert sent < 16 << 20
        assert answer(connection).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("requests_before", [0, 1])
def test_headers_that_drip_are_cut(guarded, requests_before):
    with guarded.connected() as connection:
        for _ in range(requests_before):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer_with_body(connection).endswith(b'{"status":"ok"}')
        begin = time.monotonic()
        connection.settimeout(0.2)
        for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: 12345678901234567890":
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                assert connection.recv(100) == b""
                break
        assert 0.5 < time.monotonic() - begin < 3


def test_a_body_that_drips_is_cut(guarded):
    with guarded.connected() as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}Authorization: {KEY['Authorization']}\r\n\r\n".encode())
        begin = time.monotonic()
        connection.settimeout(0.2)
        told = b""
        while time.monotonic() - begin < 10:
            with contextlib.suppress(TimeoutError):
                if not (data := connection.recv(65536)):
                    break
                told += data
            with contextlib.suppress(ConnectionError):
                connection.sendall(b" ")
        assert told.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begin < 4


def test_a_body_that_nobody_asked_for_is_cut(guarded):
    # Refused for its key, the request goes on all the same.
    with guarded.connected() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        sent, begin = 0, time.monotonic()
        with contextlib.suppress(ConnectionError):
            while sent < 100 << 20:
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
        assert sent < 16 << 20
        assert time.monotonic() - begin < 5
        assert answer(connection).startswith(b"HTTP/1.1 401")


def test_a_connection_goes_on_after_a_refusal(guarded):
    # The headers first, then the body: the answer may come before all of the request.
    with guarded.connected() as connection:
        for _ in range(3):
            connection.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\n")
            connection.sendall(b"Content-Length: 4\r\n\r\n")
            time.sleep(0.05)
            connection.sendall(b"body")
            assert answer_with_body(connection).startswith(b"HTTP/1.1 401")


def test_a_kept_connection_is_answered_at_once(guarded):
    # A small write that waits for the client's acknowledgement takes 40 ms.
    with guarded.connected() as connection:
        seconds = []
        for _ in range(8):
            begin = time.monotonic()
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer_with_body(connection)
            seconds.append(time.monotonic() - begin)
    assert min(seconds[1:]) < 0.03


def test_idle_connections_hold_nobody_up(guarded):
    before = httpx.get(f"{guarded.url}/metrics", headers=KEY)
    assert before.status_code == 200
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(guarded.connected()) for _ in range(500)]
        times = []
        for _ in range(5):
            begin = time.monotonic()
            assert httpx.get(f"{guarded.url}/health").status_code == 200
            times.append(time.monotonic() - begin)
        # On a busy machine the first of them are closed by now.
        assert guarded.metrics(KEY)["meshlm_connections"] > 100
        assert sorted(times)[2] < 1
        # They said nothing, so they are closed.
        assert all(answer(connection) == b"" for connection in idle)
    assert guarded.metrics(KEY)["meshlm_connections"] < 10


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000, b"431"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
    ],
)
def test_what_is_no_http_has_an_error_body(guarded, request_bytes, status):
    with guarded.connected() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes)
        told = answer(connection)
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status)
    assert json.loads(body)["error"]["message"]


def test_the_log_is_lines_without_prompts_and_keys(guarded):
    prompt = "a secret \r\n\x1b[31m<script>prompt"
    headers = {**KEY, "User-Agent": "agent\x1b[2J", "X-Request-Id": "mine-1"}
    assert complete(guarded, headers, prompt=prompt).headers["x-request-id"] == "mine-1"
    assert complete(guarded, headers, prompt=prompt, n=10**9).status_code == 400
    httpx.get(f"{guarded.url}/%0d%0a%1b[31m%7f?key=sk-query", headers=headers)
    end_s = time.monotonic() + 5
    while [entry.get("path", "")[:2] for entry in guarded.log()][-1] != "/\r":
        assert time.monotonic() < end_s
        time.sleep(0.05)
    text = guarded.err
    assert all(entry["event"] in ("request", "server") for entry in guarded.log())
    assert len(guarded.log()) == len(text.splitlines())
    for secret in (*KEYS, "sk-query", "secret", "<scr", "agent", "\x1b", "\x7f", "\r"):
        assert secret not in text
        assert secret not in httpx.get(f"{guarded.url}/metrics", headers=KEY).text


def test_nothing_was_lost_and_it_ends_well(guarded):
    # The last test of this server: it still serves after all of the above, and drains.
    assert complete(guarded).status_code == 200
    numbers = guarded.metrics(KEY)
    finished = [v for k, v in numbers.items() if k.startswith("meshlm_requests_finished_total")]
    assert numbers["meshlm_requests_total"] == sum(finished) > 3
    assert numbers['meshlm_requests_rejected_total{reason="too_large"}'] == 2
    assert numbers['meshlm_requests_rejected_total{reason="slow"}'] == 1
    assert guarded.children() == []
    guarded.send(signal.SIGTERM)
    assert guarded.wait_exit() == 0
    assert "Traceback" not in guarded.err


# How it ends.


def test_sigterm_lets_streams_finish_and_takes_no_more(weights, compiled):
    with Server(weights, *SMALL, environment=compiled, turn_s=0.05) as server:
        server.wait_ready()
        wanted = complete(server, max_tokens=40, temperature=0).json()["choices"][0]["text"]
        body = {"prompt": "the quick", "max_tokens": 40, "temperature": 0, "stream": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            pieces = stream.iter_text()
            text = next(pieces)
            server.send(signal.SIGTERM)
            end_s = time.monotonic() + 2
            while httpx.get(f"{server.url}/ready").status_code == 200:
                assert time.monotonic() < end_s
            refused = complete(server)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) > 0
            assert httpx.get(f"{server.url}/health").status_code == 200
            text += "".join(pieces)
        told = events(text)
        assert told[-1] == "[DONE]"
        choices = [json.loads(data)["choices"][0] for data in told[:-1]]
        assert "".join(choice["text"] for choice in choices) == wanted
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
        assert server.wait_exit(10) == 0
        assert "stopping: 1 sample may finish within 30 s" in server.out


def test_an_engine_that_fails_ends_the_process(weights, compiled):
    with Server(weights, *SMALL, environment=compiled, turn_s=0.03, turns=20) as server:
        server.wait_ready()
        whole: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: whole.append(complete(server, max_tokens=100)))
        asking.start()
        streamed = complete(server, max_tokens=100, stream=True)
        asking.join()
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert complete(server).status_code == 503
        last = events(streamed.text)[-2:]
        assert json.loads(last[0])["error"]["type"] == "server_error"
        assert last[1] == "[DONE]"
        assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (500, "engine_error")
        assert server.wait_exit(10) == 1
        assert "meshlm: RuntimeError: spoilt for a test" in server.err.splitlines()[-1]


# How it does not begin.


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("nowhere", 2, "there is nothing at this path"),
        ("WEIGHTS --host 0.0.0.0", 2, "can be reached by others: give --api-key-file"),
        ("WEIGHTS --host :: ", 2, "can be reached by others"),
        ("WEIGHTS --host nowhere.invalid --insecure", 2, "no address of that name"),
        ("WEIGHTS --port 65536", 2, "--port 65536: give 0 to 65535"),
        ("WEIGHTS --slots 0", 2, "--slots 0: give 1 or more"),
        ("WEIGHTS --max-body-bytes -1", 2, "--max-body-bytes -1"),
        ("WEIGHTS --request-timeout-s nan", 2, "--request-timeout-s nan"),
        ("WEIGHTS --max-logprobs 99", 2, "--max-logprobs 99: give at most 20"),
        ("WEIGHTS --slot 3", 2, "did you mean --slots?"),
        ("WEIGHTS --api-key-file nowhere.txt", 2, "--api-key-file nowhere.txt: No such file"),
        ("WEIGHTS --api-key-file EMPTY", 2, "there is no key in it"),
        ("WEIGHTS --api-key=", 2, "an API key is empty"),
        ("WEIGHTS --cors-origin example.org", 2, "--cors-origin example.org"),
        ("WEIGHTS --compile-cache OPEN", 2, "others can write there"),
        ("WEIGHTS --compile-cache EMPTY", 2, "--compile-cache"),
        ("WEIGHTS --tokenizer nowhere.json", 2, "nowhere.json"),
        ("WEIGHTS --port TAKEN", 4, "is taken: give another, or 0"),
        ("WEIGHTS --quantize int8 --profile hf", 2, "--profile hf"),
        ("WEIGHTS --quantize int8 --mesh.model 2", 2, "--quantize int8 is for one device"),
        ("WEIGHTS --mesh.data 2", 2, "use --mesh.model, and several servers"),
        ("WEIGHTS --slots 100000", 2, "--slots 100000: give at most 1024"),
        ("WEIGHTS --max-samples 0", 2, "--max-samples 0: give 1 or more"),
        ("WEIGHTS --allowed-host http://x", 2, "give a name alone"),
        ("DAMAGED", 3, "damaged"),
    ],
)
def test_what_it_refuses_to_begin_with(words, code, said, meshlm, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    if "DAMAGED" in words:
        damaged = write_checkpoint(tmp_path / "damaged")
        largest = max(damaged.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {
            "WEIGHTS": weights,
            "EMPTY": tmp_path / "empty",
            "OPEN": tmp_path / "open",
            "TAKEN": taken.getsockname()[1],
            "DAMAGED": tmp_path / "damaged" / "checkpoints" / "step_1",
        }
        given = [str(names.get(word, word)) for word in words.split()]
        found, out, err = meshlm("serve", *given)
    assert (found, out) == (code, "")
    assert said in one_line(err)


def test_a_folder_for_compiled_functions_is_its_owners(meshlm, weights, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, *_ = meshlm("serve", weights, "--port", taken.getsockname()[1])
    assert code == 4
    assert (tmp_path / "meshlm" / "compiled").stat().st_mode & 0o777 == 0o700


def test_limits_have_an_option_each():
    options = (Path(__file__).parents[1] / "golden" / "flags" / "serve.txt").read_text().split()
    for config in (Limits, EngineConfig):
        for field in dataclasses.fields(config):
            assert f"--{field.name.replace('_', '-')}" in options
