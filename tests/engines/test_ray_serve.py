"""launch/ray_serve.py on a real Ray: two replicas on two processors."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from packaging.requirements import Requirement

from programs import LAUNCH, Program, eventually, find
from servers import Server, events
from teams import free_port

pytestmark = pytest.mark.timeout(400)

KEY = {"authorization": "Bearer secret"}
# Enough for a request of 16 samples after another, and too few for three at once.
OPTIONS = ("--api-key", "secret", "--model-id", "tiny", "--slots", "1", "--max-queue", "31")
LONG = {"prompt": "the quick", "max_tokens": 1500, "n": 8, "model": "tiny"}


class Application:
    """The template as `serve run` runs it."""

    def __init__(self, head: Program, run: Program, url: str, env: dict[str, str]) -> None:
        self.head, self.run, self.url, self.env = head, run, url, env

    def servers(self) -> list[psutil.Process]:
        """Returns the servers that run, each a child of a worker of Ray's."""
        return [p for p in find("serve", "--port") if p.parent() != psutil.Process()]

    def answers(self) -> bool:
        """Whether a request comes to a server and back."""
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> dict[str, float]:
        """Returns the sums of what the servers' own /metrics tell."""
        total: dict[str, float] = {}
        for server in self.servers():
            for connection in server.net_connections("tcp"):
                if connection.status != psutil.CONN_LISTEN:
                    continue
                text = httpx.get(f"http://127.0.0.1:{connection.laddr.port}/metrics", headers=KEY)
                for line in text.text.splitlines():
                    if not line.startswith("#"):
                        name, value = line.rsplit(" ", 1)
                        total[name] = total.get(name, 0.0) + float(value)
        return total

    def are_ready(self, count: int) -> bool:
        """Whether that many servers take requests."""
        assert self.run.process.poll() is None, self.run.text
        servers = self.servers()
        try:
            return len(servers) == count and self.metrics()["meshlm_slots"] == count
        except (KeyError, httpx.TransportError, psutil.NoSuchProcess):
            return False


@pytest.fixture(scope="module")
def application(ray, weights, compiled, tmp_path_factory) -> Iterator[Application]:
    head, env = ray
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    serve = Path(sys.executable).with_name("serve")
    options = " ".join((*OPTIONS, "--compile-cache", str(compiled)))
    start = Program(
        [serve, "start", "--http-host", "127.0.0.1", "--http-port", port], folder / "start", env
    )
    assert start.process.wait(180) == 0, start.text
    words = [f"weights={weights}", f"options={options}", "replicas=2", "most_replicas=2", "cpus=1"]
    run = Program([serve, "run", "ray_serve:application", *words], folder / "run", env, cwd=LAUNCH)
    made = Application(head, run, f"http://127.0.0.1:{port}", env)
    try:
        eventually(lambda: made.are_ready(2), 240, lambda: run.text)
        eventually(made.answers, 60)
        yield made
    finally:
        run.end()


@pytest.fixture(scope="module")
def alone(weights, compiled) -> Iterator[Server]:
    """The same server without Ray."""
    with Server(weights, *OPTIONS, "--compile-cache", str(compiled)) as server:
        yield server.wait_ready(180)


def test_the_template_needs_what_ray_and_meshlm_install():
    """This environment has more than a user's: for the tests."""
    text = (LAUNCH / "ray_serve.py").read_text()
    modules = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    providers = importlib.metadata.packages_distributions()
    needed = closure("ray", {"serve"}) | closure("meshlm", set())
    for module in modules - sys.stdlib_module_names:
        assert {name.lower() for name in providers[module]} & needed, module


def closure(name: str, extras: set[str]) -> set[str]:
    """The names of all distributions that installing one brings."""
    seen: set[tuple[str, str]] = set()
    left = [(name, extra) for extra in {"", *extras}]
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        for text in importlib.metadata.requires(one[0]) or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": one[1]}):
                left += [(wanted.name.lower(), extra) for extra in {"", *wanted.extras}]
    return {found for found, _ in seen}


def same(answer: httpx.Response) -> tuple[int, bytes]:
    """Status and body, without what each answer has anew: its id and its time."""
    body = re.sub(rb'"(id|created)":\s*("[^"]*"|\d+)', b"", answer.content)
    return answer.status_code, body


@pytest.mark.parametrize(
    ("method", "path", "headers", "body"),
    [
        ("GET", "/v1/models", KEY, None),
        ("GET", "/v1/models", {}, None),
        ("GET", "/v1/models", {"authorization": "Bearer other"}, None),
        ("GET", "/version?limits=1", KEY, None),
        ("GET", "/", {}, None),
        ("GET", "/static/app.css", {"accept-encoding": "gzip"}, None),
        ("GET", "/nothing%2Fhere?a=b%26c", KEY, None),
        ("DELETE", "/v1/models", KEY, None),
        ("POST", "/v1/completions", KEY, {"prompt": "the quick", "max_tokens": 20, "seed": 1}),
        ("POST", "/v1/completions", KEY, {"prompt": "\u00e9\u4e16", "max_tokens": 9, "seed": -1}),
        ("POST", "/v1/completions", {}, {"prompt": "the quick"}),
        ("POST", "/v1/completions", KEY, {"prompt": 5}),
        (
            "POST",
            "/v1/completions",
            KEY,
            {"prompt": "fox", "max_tokens": 8, "seed": 3, "stream": True, "n": 2},
        ),
        (
            "POST",
            "/v1/chat/completions",
            KEY,
            {"messages": [{"role": "user", "content": "the"}], "max_tokens": 5, "seed": 2},
        ),
    ],
)
def test_answers_are_the_servers_own(application, alone, method, path, headers, body):
    answers = [
        httpx.request(method, base + path, headers=headers, json=body, timeout=60)
        for base in (application.url, alone.url)
    ]
    assert same(answers[0]) == same(answers[1])
    kept = ("content-type", "www-authenticate", "x-should-retry", "cache-control", "etag")
    kept = (*kept, "content-security-policy", "content-encoding", "allow")
    for name in kept:
        assert answers[0].headers.get_list(name) == answers[1].headers.get_list(name), name
    for name in ("date", "server", "x-request-id"):
        assert len(answers[0].headers.get_list(name)) == 1, name


def test_a_body_that_is_too_large_is_refused_by_the_server(application):
    body = {"prompt": "x" * (3 << 20)}
    answer = httpx.post(f"{application.url}/v1/completions", headers=KEY, json=body, timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"]


def test_a_stream_comes_while_it_is_made_and_a_client_that_leaves_frees_its_slot(application):
    name = 'meshlm_requests_finished_total{reason="cancelled"}'
    before = application.metrics()[name]
    body = {**LONG, "stream": True}
    url = f"{application.url}/v1/completions"
    with httpx.stream("POST", url, headers=KEY, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # kept: the client leaves when it is gone
        assert next(lines).startswith("data: {")
        eventually(lambda: application.metrics()["meshlm_samples_running"] == 1, 20)
    eventually(lambda: application.metrics()["meshlm_samples_running"] == 0, 30)
    assert application.metrics()[name] == before + 1
    # And one that leaves before there is an answer.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, headers=KEY, json=LONG, timeout=httpx.Timeout(60, read=1))
    eventually(lambda: application.metrics()["meshlm_samples_running"] == 0, 30)
    assert application.metrics()[name] == before + 2


def test_a_full_server_says_so_itself(application):
    """Each replica has room for two of these, and Ray sends on to it what comes beyond."""
    found: list[httpx.Response] = []
    body = {**LONG, "n": 16, "max_tokens": 200}

    def ask() -> None:
        url = f"{application.url}/v1/completions"
        found.append(httpx.post(url, headers=KEY, json=body, timeout=200))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in found)
    assert set(codes) == {200, 429}, codes
    refused = next(answer for answer in found if answer.status_code == 429)
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["code"]


def ask_with_patience(application: Application) -> dict[str, Any]:
    """As a client of OpenAI's does, which asks again after 5xx and broken connections."""
    body = {"prompt": "the quick", "max_tokens": 4, "seed": 1, "model": "tiny"}

    def ask() -> dict[str, Any] | None:
        try:
            url = f"{application.url}/v1/completions"
            answer = httpx.post(url, headers=KEY, json=body, timeout=60)
        except httpx.TransportError:
            return None
        assert answer.status_code in (200, 500, 503), answer.text
        return answer.json() if answer.status_code == 200 else None

    return eventually(ask, 60)


@pytest.mark.parametrize("whom", ["server", "worker"])
def test_a_replica_that_is_killed_is_replaced_and_requests_go_on(application, whom):
    wanted = ask_with_patience(application)["choices"]
    eventually(lambda: application.are_ready(2), 240, lambda: application.run.text)
    server = application.servers()[0]
    victim = server if whom == "server" else server.parent()
    victim.kill()
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running()  # it does not outlive its worker
    for _ in range(20):
        assert ask_with_patience(application)["choices"] == wanted
    eventually(lambda: application.are_ready(2), 240, lambda: application.run.text)
    assert ask_with_patience(application)["choices"] == wanted


def stream_until(application: Application, stop: Callable[[], object]) -> None:
    """Reads a long stream to its end, and stops something once it has begun."""
    body = {**LONG, "stream": True, "seed": 1}
    url = f"{application.url}/v1/completions"
    with httpx.stream("POST", url, headers=KEY, json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        text = [next(lines)]
        stop()
        text += lines
    found = events("\n".join(text))
    assert found[-1] == "[DONE]"
    reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in found[:-1]]
    assert reasons.count("length") == LONG["n"]


def test_a_server_that_is_told_to_stop_finishes_its_stream_and_is_replaced(application):
    servers = application.servers()
    assert len(servers) == 2

    def stop() -> None:
        for server in servers:
            server.terminate()

    stream_until(application, stop)
    assert not psutil.wait_procs(servers, timeout=30)[1]
    eventually(lambda: application.are_ready(2), 240, lambda: application.run.text)
    assert ask_with_patience(application)


def test_the_end_lets_streams_finish_and_leaves_no_server(application, tmp_path):
    servers = application.servers()
    assert len(servers) == 2
    words = "from ray import serve; serve.delete('default')"
    deleted: list[Program] = []

    def stop() -> None:
        command = [sys.executable, "-c", words]
        deleted.append(Program(command, tmp_path / "log", application.env))

    stream_until(application, stop)
    assert not psutil.wait_procs(servers, timeout=90)[1]
    assert deleted[0].process.wait(90) == 0, deleted[0].text
