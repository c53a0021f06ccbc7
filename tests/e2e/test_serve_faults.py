"""`meshlm serve` under floods, vanishing clients and signals at bad moments."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from servers import END_OF_TEXT, Server, events, write_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
SMALL = ("--prefill-chunk", "16")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def slow(weights, compiled) -> Iterator[Server]:
    """A server with four slots whose turns take 20 ms, so that requests overlap."""
    options = ("--slots", "4", "--max-queue", "128", *SMALL)
    with Server(weights, *options, environment=compiled, turn_s=0.02) as server:
        yield server.wait_ready()


def body(**fields) -> dict:
    """A long request. It has end-of-text forbidden, so that it is as long as it says."""
    long = {"prompt": "the quick", "max_tokens": 120, "temperature": 0}
    return {**long, "logit_bias": {str(END_OF_TEXT): -100}, **fields}


def wait_until(condition, timeout_s: float = 10) -> float:
    """Returns after how many seconds it was so."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s
        time.sleep(0.02)
    return time.monotonic() - begin


def idle(server: Server) -> bool:
    numbers = server.metrics()
    return numbers["meshlm_samples_running"] == numbers["meshlm_samples_waiting"] == 0


def adds_up(server: Server) -> None:
    """Every request that was taken up has ended in one way, and every sample too."""
    numbers = server.metrics()
    ended = [v for k, v in numbers.items() if k.startswith("meshlm_requests_finished_total")]
    assert numbers["meshlm_requests_total"] == sum(ended)


async def flood(server: Server, count: int, **options) -> tuple[list, list[float]]:
    """`count` requests at once: their answers or errors; and the times of /health meanwhile."""
    limits = httpx.Limits(max_connections=None)
    times = []

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            begin = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            times.append(time.monotonic() - begin)
            await asyncio.sleep(0.05)

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client,
        httpx.AsyncClient(base_url=server.url, timeout=30) as other,
    ):
        watcher = asyncio.create_task(watch(other))
        asked = [client.post("/v1/completions", **options) for _ in range(count)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        watcher.cancel()
    return answers, times


def test_a_flood_is_refused_in_part_and_served_in_part(slow):
    before = slow.metrics()
    answers, times = asyncio.run(flood(slow, 300, json=body(max_tokens=10)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert 128 <= codes.count(200) < 300
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "queue_full"
            assert answer.elapsed.total_seconds() < 10
        else:
            assert answer.json()["usage"]["completion_tokens"] == 10
    numbers = slow.metrics()
    # Those that were served waited for each other.
    waits = numbers["meshlm_queue_seconds_sum"] - before["meshlm_queue_seconds_sum"]
    counts = [n["meshlm_queue_seconds_count"] for n in (before, numbers)]
    assert counts[1] - counts[0] == codes.count(200)
    assert waits > codes.count(200) * 0.1
    refused = 'meshlm_requests_rejected_total{reason="queue_full"}'
    assert numbers[refused] - before[refused] == codes.count(429)
    # On a machine with nothing else to do the 95th of 100 is below 0.2 s; bench/load.py tells it.
    assert np.median(times) < 1
    adds_up(slow)


@pytest.mark.parametrize("stream", [False, True])
def test_two_hundred_clients_that_give_up(slow, stream):
    # As vLLM tests it: long requests with half a second of patience, then a short one.
    options = {"json": body(stream=stream), "timeout": 0.5}
    answers, _ = asyncio.run(flood(slow, 200, **options))
    patient = [answer for answer in answers if not isinstance(answer, httpx.TransportError)]
    assert {answer.status_code for answer in patient} <= {429, 200}
    assert len(answers) - len(patient) > 50
    begin = time.monotonic()
    assert slow.complete(max_tokens=2).status_code == 200
    assert time.monotonic() - begin < 5
    assert wait_until(lambda: idle(slow)) < 2
    adds_up(slow)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["running", "prefill", "queued"])
def test_a_client_that_goes_frees_its_slot(slow, stream, moment):
    wait_until(lambda: idle(slow))
    fields = body(stream=stream)
    if moment == "prefill":
        fields["prompt"] = [7] * 100
        fields["max_tokens"] = 20
    with contextlib.ExitStack() as stack:
        others = 4 if moment == "queued" else 0
        for _ in range(others):
            connection = stack.enter_context(slow.connected())
            connection.sendall(raw(body(stream=True)))
        if others:
            wait_until(lambda: slow.metrics()["meshlm_samples_running"] == 4)
        with slow.connected() as connection:
            connection.sendall(raw(fields))
            name = "meshlm_samples_waiting" if others else "meshlm_samples_running"
            wait_until(lambda: slow.metrics()[name] == 1)
            before = slow.metrics()
        gone = "meshlm_samples_cancelled_total"
        wait_until(lambda: slow.metrics()[gone] == before[gone] + 1, 2)
    # All gone now. Steps are 20 ms each: two of them, and what it takes to notice.
    assert wait_until(lambda: idle(slow), 2) < 1
    begin = time.monotonic()
    assert slow.complete(max_tokens=1).status_code == 200
    assert time.monotonic() - begin < 1


def raw(fields: dict) -> bytes:
    content = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
    return f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + content


def test_a_slot_is_free_within_two_steps(slow):
    wait_until(lambda: idle(slow))
    steps = "meshlm_decode_steps_total"
    with slow.connected() as connection:
        connection.sendall(raw(body(stream=True)))
        connection.recv(100)
        before = slow.metrics()[steps]
    wait_until(lambda: idle(slow))
    # Two steps, and those in the time between asking for the number and going away.
    assert slow.metrics()[steps] - before <= 2 + 3


def test_more_connections_than_may_be(weights, compiled):
    options = ("--slots", "1", "--max-connections", "20", *SMALL)
    with Server(weights, *options, environment=compiled) as server:
        server.wait_ready()
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(server.connected()) for _ in range(20)]
            time.sleep(0.3)
            with server.connected() as one_more, contextlib.suppress(ConnectionError):
                assert one_more.recv(1) == b""
            held[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert held[0].recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: server.complete().status_code == 200)


def test_a_client_that_reads_nothing_is_cut(weights, compiled):
    options = ("--slots", "1", "--idle-timeout-s", "1", *SMALL)
    with Server(weights, *options, environment=compiled) as server:
        server.wait_ready()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(page * 2000)
            wait_until(lambda: server.metrics()["meshlm_connections"] == 1, 20)


# Signals.


class Stream(threading.Thread):
    """A client that streams; it has begun when `start` returns."""

    def __init__(self, server: Server, **fields) -> None:
        super().__init__()
        self.server, self.fields = server, body(stream=True, **fields)
        self.text, self.error = "", None
        self.begun = threading.Event()

    def run(self) -> None:
        url = f"{self.server.url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=self.fields, timeout=60) as answer:
                for piece in answer.iter_text():
                    self.text += piece
                    self.begun.set()
        except httpx.TransportError as error:
            self.error = error

    def start(self) -> None:
        super().start()
        assert self.begun.wait(30)


def test_no_time_to_drain_ends_streams_with_an_error(weights, compiled):
    options = ("--slots", "1", "--drain-s", "0", *SMALL)
    with Server(weights, *options, environment=compiled, turn_s=0.05) as server:
        server.wait_ready()
        stream = Stream(server)
        stream.start()
        queued = threading.Thread(target=lambda: answers.append(server.complete()))
        answers: list[httpx.Response] = []
        queued.start()
        wait_until(lambda: server.metrics()["meshlm_samples_waiting"] == 1)
        begin = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.wait_exit(10) == 0
        assert time.monotonic() - begin < 5
        stream.join()
        queued.join()
        error, done = events(stream.text)[-2:]
        assert json.loads(error)["error"]["code"] == "draining"
        assert done == "[DONE]"
        assert answers[0].status_code == 503
        assert int(answers[0].headers["retry-after"]) > 0


def test_the_second_sigterm_ends_it_now(weights, compiled):
    with Server(weights, "--slots", "1", *SMALL, environment=compiled, turn_s=0.1) as server:
        server.wait_ready()
        stream = Stream(server)
        stream.start()
        server.send(signal.SIGTERM)
        wait_until(lambda: "stopping" in server.out)
        assert server.process.poll() is None
        begin = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.wait_exit(5) == -signal.SIGTERM
        assert time.monotonic() - begin < 1
        stream.join()
        assert stream.error is not None


def test_ctrl_c_drains_too(weights, compiled):
    with Server(weights, "--slots", "1", *SMALL, environment=compiled, turn_s=0.02) as server:
        server.wait_ready()
        stream = Stream(server)
        stream.start()
        server.send(signal.SIGINT)
        assert server.wait_exit(20) == 130
        stream.join()
        assert events(stream.text)[-1] == "[DONE]"
        assert "Traceback" not in server.err


def test_sigterm_while_it_loads(weights):
    # Without what others compiled: it is at it for a while.
    environment = {"JAX_COMPILATION_CACHE_DIR": ""}
    with Server(weights, environment=environment) as server:
        server.wait_listening()
        loading = httpx.get(f"{server.url}/health")
        assert loading.json()["error"] == {
            "code": 503,
            "message": "Loading model",
            "type": "unavailable_error",
        }
        refused = server.complete()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert httpx.get(server.url).status_code == 200
        begin = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.wait_exit(10) == 0
        assert time.monotonic() - begin < 5


def test_what_the_engine_finds_wrong_while_it_loads(weights, compiled):
    # The server listens already: it ends, with the exit code and the line of any command.
    with Server(weights, "--mesh.model", "2", environment=compiled) as server:
        assert server.wait_exit(60) == 2
        assert server.err.splitlines()[-1].startswith("meshlm: ")
        assert "Traceback" not in server.err


def test_the_second_start_is_fast_and_opens_a_browser(weights, tmp_path):
    browser = tmp_path / "browser"
    opened = tmp_path / "opened"
    opened.touch()
    browser.write_text(f"#!/bin/sh\necho $1 >> {opened}\n")
    browser.chmod(0o755)
    environment = {"BROWSER": f"{browser} %s"}
    (tmp_path / "compiled").mkdir(mode=0o700)
    options = ("--slots", "4", "--compile-cache", str(tmp_path / "compiled"), "--open")
    times, urls = [], []
    for _ in range(2):
        with Server(weights, *options, environment=environment) as server:
            server.wait_ready()
            urls.append(server.url)
            wait_until(lambda: server.url in opened.read_text())
            line = next(line for line in server.out.splitlines() if line.startswith("ready in"))
            times.append(float(line.split()[2]))
            server.send(signal.SIGTERM)
            assert server.wait_exit() == 0
    assert times[1] < times[0] / 2
    assert opened.read_text().split() == urls
