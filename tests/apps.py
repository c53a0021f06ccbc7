"""The API over an engine with a tiny random model, in this process: for the tests of the API."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import uvicorn

from meshlm.api import Model
from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer, train_bpe
from meshlm.generation import DecodeModel
from meshlm.generation.profiles import numerics
from meshlm.serving.api.app import create_app
from meshlm.serving.config import EngineConfig, Limits
from meshlm.serving.engine import Engine, Loaded
from meshlm.serving.metrics import Metrics
from meshlm.serving.requests import OnEvent, Request, State
from tiny import CONFIG, F32, draw_params

MODEL_ID = "tiny"
CONTEXT = 128
LIMITS = Limits(max_samples=24)
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps. é ü 😀\n\nUser: hi. " * 4
ENGINE = EngineConfig(slots=4, max_queue=24, prefill_chunk=32)


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 300)


def config():
    # Rows beyond the tokens, as GPT-J has.
    return dataclasses.replace(
        CONFIG, vocab_size=tokenizer().vocab_size + 7, context_length=CONTEXT
    )


@functools.cache
def model() -> Model:
    """The same weights as a `Model`: what it gives is what the API has to give."""
    mesh = make_mesh(MeshConfig())
    return Model(
        _decode_model().params, config(), tokenizer(), numerics("fast", "float32", "float32"), mesh
    )


@functools.cache
def _decode_model() -> DecodeModel:
    return DecodeModel.prepare(
        draw_params(config()), config(), F32, allowed_vocab=tokenizer().vocab_size
    )


@functools.cache
def engine() -> Engine:
    """One engine for all tests of a process: compiling is most of its time."""
    made = Engine(
        lambda: Loaded(
            model=_decode_model(),
            tokenizer=tokenizer(),
            special_tokens=SpecialTokens.of(tokenizer()),
        ),
        ENGINE,
    )
    made.start()
    atexit.register(stop, made)
    while made.state == "loading":
        time.sleep(0.01)
    assert made.state == "ready", made.error
    return made


def stop(made: Engine) -> None:
    made.abort("the tests are over")
    made.join(30)


def app(
    over: Any = None, limits: Limits = LIMITS, *, metrics: Metrics | None = None, chat: bool = True
):
    """The API; `over` is an engine, or what stands for one."""
    return create_app(
        engine() if over is None else over,
        limits,
        model_id=MODEL_ID,
        created=1234567890,
        fingerprint="fp_test",
        chat_template=chat,
        metrics=metrics or Metrics(),
    )


class Broken:
    """Stands for an engine: it refuses, or it answers with the events that it is given."""

    config = ENGINE

    def __init__(
        self, *script: Any, state: State = "ready", is_loaded: bool = True, ahead: int | None = None
    ) -> None:
        self.script = script
        self.state = state
        self.progress = "compiling 3 of 9"
        self.is_loaded = is_loaded
        self.ahead = ahead
        self.submitted = self.cancelled = 0

    @property
    def loaded(self) -> Any:
        return engine().loaded if self.is_loaded else None

    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> Broken:
        self.submitted += 1
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            on_event(0, step)
        return self

    def cancel(self) -> None:
        self.cancelled += 1


class Client:
    """Asks an app without a socket, each call in an event loop of its own."""

    def __init__(self, served: Any) -> None:
        self.app = served

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, timeout=60, **options)

        return asyncio.run(ask())

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.request("POST", path, json=body)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        response = self.post("/v1/completions", fields)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, without the last, which is [DONE]."""
        response = self.post(path, {"stream": True, **fields})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.text)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream's text; comments are left out, and [DONE] must be last."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    found = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert all(block.startswith((":", "data: ")) and "\n" not in block for block in blocks)
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


def assert_error(response: httpx.Response, status: int, **expected: Any) -> str:
    """The message of an answer that has OpenAI's error body, with that status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert {key: error[key] for key in expected} == expected
    return error["message"]


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Returns as soon as `condition()` is true."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def listening(served: Any) -> Iterator[str]:
    """The address of an app that answers on a loopback socket, from a thread."""
    server = uvicorn.Server(
        uvicorn.Config(served, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
