"""The API over a real engine with a tiny model, in this process, and over one that fails."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
import time
from typing import Any

import numpy as np
import pytest

from apps import (
    CONTEXT,
    ENGINE,
    LIMITS,
    MODEL_ID,
    Broken,
    Client,
    app,
    assert_error,
    engine,
    events,
    model,
    tokenizer,
    until,
)
from meshlm.generation import Generation
from meshlm.serving.api.waiting import to_json
from meshlm.serving.config import Limits
from meshlm.serving.http.guards import Keys
from meshlm.serving.http.logs import LineLog
from meshlm.serving.http.middleware import protect
from meshlm.serving.metrics import Metrics
from meshlm.serving.requests import (
    Failed,
    FailureKind,
    Finished,
    NotReadyError,
    Piece,
    QueueFullError,
    TokenScore,
)

FOX = "the quick brown fox"


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(app())


def generate(prompt: str | list[int], **options: Any) -> list[Generation]:
    """What the model gives for a prompt, two samples; every call has the same few shapes."""
    return model().generate([prompt, "the dog"], **{"max_tokens": 12, "n": 2, **options})[:2]


OPTIONS = [
    {"temperature": 0},
    {"seed": 5},
    {"seed": 6, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01},
    {"seed": 7, "temperature": 1.3, "repetition_penalty": 1.4},
    {"seed": 8, "stop": ["e", "qu"], "max_tokens": 40},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_texts_are_those_of_the_model(client: Client, options: dict[str, Any]) -> None:
    fields = {"max_tokens": 12, "n": 2, **options}
    wanted = model().generate([FOX, "the dog"], **fields)
    found = client.complete(
        prompt=[FOX, "the dog"], model=MODEL_ID, return_token_ids=True, logprobs=0, **fields
    )
    assert [c["text"] for c in found["choices"]] == [g.text for g in wanted]
    assert [c["token_ids"] for c in found["choices"]] == [g.tokens for g in wanted]
    assert [c["finish_reason"] for c in found["choices"]] == [g.finish_reason for g in wanted]
    assert [c["index"] for c in found["choices"]] == list(range(len(wanted)))
    for choice, sample in zip(found["choices"], wanted, strict=True):
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], sample.logprobs, atol=1e-4)
    usage = found["usage"]
    assert usage["prompt_tokens"] == sum(len(tokenizer().encode(p)) for p in (FOX, "the dog"))
    assert usage["completion_tokens"] == sum(len(g.tokens) for g in wanted)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_no_prompt_is_end_of_text(client: Client) -> None:
    wanted = generate("", seed=3)[0].text
    eot = tokenizer().end_of_text_id
    for prompt in (None, "", [eot], [[eot]], [""]):
        found = client.complete(prompt=prompt, seed=3, max_tokens=12)
        assert found["choices"][0]["text"] == wanted
        assert found["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("options", OPTIONS)
def test_stream_says_the_same(client: Client, options: dict[str, Any]) -> None:
    fields = {"prompt": FOX, "max_tokens": 24, "logprobs": 2, "echo": True, **options}
    whole = client.complete(**fields)
    chunks = client.stream(**fields, stream_options={"include_usage": True})
    last = chunks.pop()
    assert last["choices"] == []
    # The second request finds the first one's prompt computed.
    details = last["usage"].pop("prompt_tokens_details")
    assert details["cached_tokens"] >= whole["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert last["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [
            choice["finish_reason"]
        ]
        for key in ("tokens", "text_offset"):
            told = [x for p in parts if p["logprobs"] for x in p["logprobs"][key]]
            assert told == choice["logprobs"][key]


def test_lm_eval_contract(client: Client) -> None:
    """What lm_eval sends and computes; the model says what has to come out."""
    rng = np.random.default_rng(0)
    size = tokenizer().vocab_size
    prompts = [rng.integers(0, size, length).tolist() for length in (2, 9, 33, CONTEXT - 1)]
    greedy = generate(prompts[1], temperature=0)[0].tokens
    prompts.append(prompts[1] + greedy)
    found = client.complete(
        model=MODEL_ID,
        prompt=prompts,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    context_lengths = [1, 3, 20, 100, len(prompts[1])]
    for choice, prompt, length in zip(found["choices"], prompts, context_lengths, strict=True):
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(prompt) + 1}
        log_probs = told["token_logprobs"][length:-1]
        top = [max(top.values()) for top in told["top_logprobs"][length:-1]]
        wanted, is_greedy = model().loglikelihood(prompt[:length], prompt[length:])
        assert sum(log_probs) == pytest.approx(wanted, abs=1e-3)
        assert (log_probs == top) == is_greedy
    assert is_greedy, "the last one is what greedy decoding gives"


def test_prompt_scores_are_those_of_the_model(client: Client) -> None:
    tokens = tokenizer().encode(FOX * 4)
    found = client.complete(prompt=FOX * 4, echo=True, max_tokens=0, logprobs=3)
    told = found["choices"][0]["logprobs"]["token_logprobs"]
    logits = model().logits([tokens])[0]
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    wanted = [log_probs[i, token] for i, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(told[1:], wanted, atol=1e-4)
    assert found["choices"][0]["text"] == FOX * 4
    assert found["usage"]["completion_tokens"] == 0


def test_bias_forces_and_forbids(client: Client) -> None:
    forced = client.complete(prompt=FOX, logit_bias={"7": 100}, max_tokens=4, return_token_ids=True)
    assert forced["choices"][0]["token_ids"] == [7] * 4
    greedy = generate(FOX, temperature=0)[0].tokens[0]
    other = client.complete(
        prompt=FOX,
        temperature=0,
        logit_bias={str(greedy): -100},
        max_tokens=3,
        return_token_ids=True,
    )
    assert greedy not in other["choices"][0]["token_ids"]


def test_end_of_text_ends_it_or_not(client: Client) -> None:
    eot = tokenizer().end_of_text_id
    fields = {"prompt": FOX, "logit_bias": {str(eot): 100}, "max_tokens": 3, "logprobs": 0}
    ended = client.complete(**fields)["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert ended["logprobs"]["tokens"] == ["<|endoftext|>"]
    on = client.complete(**fields, ignore_eos=True)["choices"][0]
    assert on["finish_reason"] == "length"
    assert len(on["logprobs"]["tokens"]) == 3


def test_best_of(client: Client) -> None:
    fields = {"prompt": FOX, "seed": 9, "max_tokens": 6, "logprobs": 0}
    means = {
        choice["text"]: np.mean(choice["logprobs"]["token_logprobs"])
        for choice in client.complete(**fields, n=8)["choices"]
    }
    found = client.complete(**fields, n=2, best_of=8)
    wanted = sorted(means, key=lambda text: -means[text])[:2]
    assert [choice["text"] for choice in found["choices"]] == wanted
    assert found["usage"]["completion_tokens"] >= 8


def test_chat(client: Client) -> None:
    fields = {"messages": [{"role": "user", "content": "hi"}], "seed": 4, "max_tokens": 12}
    response = client.post("/v1/chat/completions", fields | {"n": 2})
    assert response.status_code == 200
    whole = response.json()
    wanted = generate("User: hi\n\nAssistant:", seed=4, stop=["\n\nUser:", "\nUser:"])
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert texts == [sample.text.removeprefix(" ") for sample in wanted]
    chunks = [c["choices"][0] for c in client.stream("/v1/chat/completions", **fields, n=2)]
    for index, text in enumerate(texts):
        deltas = [chunk["delta"] for chunk in chunks if chunk["index"] == index]
        assert "".join(delta.get("content", "") for delta in deltas) == text
        assert deltas[0]["role"] == "assistant"


def test_chat_switched_off() -> None:
    response = Client(app(chat=False)).post("/v1/chat/completions", {"messages": []})
    message = assert_error(response, 404, code="chat_disabled")
    assert "/v1/completions" in message


BAD_BODIES = {
    "text": (b'"x"', "application/json"),
    "list": (b"[]", "application/json"),
    "number": (b"42", "application/json"),
    "null": (b"null", "application/json"),
    "nothing": (b"", "application/json"),
    "nan": (b'{"temperature": NaN}', "application/json"),
    "deep": (b"[" * 10_000 + b"]" * 10_000, "application/json"),
    "not UTF-8": (b'{"prompt": "\xff"}', "application/json"),
    "another type": (b'{"prompt": "a"}', "text/plain"),
    "no type": (b'{"prompt": "a"}', ""),
    "strange type": (b'{"prompt": "a"}', "\xff;;=/"),
    "a form": (b"prompt=a", "application/x-www-form-urlencoded"),
    "charset": (b'{"prompt": "a"}', "application/json; charset=latin-1"),
}
POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/complete",
    "/completion",
)


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(client: Client, name: str) -> None:
    body, kind = BAD_BODIES[name]
    for path in POSTS:
        headers = {"content-type": kind.encode("latin-1")} if kind else {}
        response = client.request("POST", path, content=body, headers=headers)
        assert_error(response, 400)
        assert response.headers["x-should-retry"] == "false"


def test_types_of_json(client: Client) -> None:
    for kind in ("application/json; charset=utf-8", 'Application/JSON; charset="UTF-8"'):
        response = client.request(
            "POST", "/tokenize", content=b'{"text": "a"}', headers={"content-type": kind}
        )
        assert response.status_code == 200


def test_long_body(client: Client) -> None:
    short = Client(app(limits=Limits(max_body_bytes=100)))
    assert_error(short.post("/tokenize", {"text": "a" * 100}), 413)
    assert short.post("/tokenize", {"text": "a" * 50}).status_code == 200


def test_other_paths(client: Client) -> None:
    assert_error(client.get("/v1/nothing"), 404, code="not_found")
    assert_error(client.get("/v1/models/"), 404)
    response = client.get("/v1/completions")
    assert_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    for path in ("/docs", "/redoc"):
        assert_error(client.get(path), 404)


def test_models(client: Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (described,) = listed["data"]
    assert client.get(f"/v1/models/{MODEL_ID}").json() == described
    assert described["id"] == MODEL_ID
    assert described["object"] == "model"
    assert described["context_length"] == CONTEXT
    for name in ("other", "../../etc/passwd", "a/b", "%2e%2e"):
        assert_error(client.get(f"/v1/models/{name}"), 404)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            fields = {"/detokenize": {"tokens": []}, "/v1/chat/completions": {"messages": []}}
            body = {"model": name, **fields.get(path, {})}
            assert_error(client.post(path, body), 404, code="model_not_found", param="model")


def test_tokens(client: Client) -> None:
    text = "the fox é \U0001f600"
    wanted = tokenizer().encode(text)
    for name in ("prompt", "text"):
        found = client.post("/tokenize", {name: text, "add_special_tokens": False}).json()
        assert found == {"tokens": wanted, "count": len(wanted), "max_model_len": CONTEXT}
    named = client.post("/tokenize", {"text": text, "return_token_strs": True}).json()
    assert len(named["token_strs"]) == len(wanted)
    assert client.post("/detokenize", {"tokens": wanted}).json() == {"prompt": text}
    assert client.post("/tokenize", {"text": ""}).json()["count"] == 0
    assert_error(client.post("/tokenize", {}), 400, param="prompt")
    assert_error(client.post("/tokenize", {"text": "a", "prompt": "a"}), 400, param="prompt")
    assert_error(client.post("/detokenize", {"tokens": [10**6]}), 400, param="tokens[0]")
    assert_error(client.post("/detokenize", {}), 400, param="tokens")


def test_tokenizer_info(client: Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    # Clients ask for the id of that text.
    found = client.post("/tokenize", {"prompt": info["eos_token"]}).json()["tokens"]
    assert found == [info["eos_token_id"]] == [tokenizer().end_of_text_id]


def test_version(client: Client) -> None:
    assert "limits" not in client.get("/version").json()
    limits = client.get("/version?limits=1").json()["limits"]
    assert limits["max_n"] == LIMITS.max_n
    assert limits["slots"] == ENGINE.slots
    assert limits["context_length"] == CONTEXT


def test_original_complete(client: Client) -> None:
    found = client.post("/complete", {"context": FOX, "top_p": 0.9, "temp": 0.75}).json()
    assert found.keys() == {"completion"}
    for fields, param in (
        ({"context": 5}, "context"),
        ({}, "context"),
        ({"context": "a", "top_p": 2}, "top_p"),
        ({"context": "a", "temp": "hot"}, "temp"),
        ({"context": "a", "gen_len": 5}, "gen_len"),
        ({"context": "a " * 500}, "context"),
    ):
        assert_error(client.post("/complete", fields), 400, param=param)
    assert client.post("/complete", {"context": "a"}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9, "temp": 0.8, "response_length": 5, "remove_input": True},
        {"topP": 0.9, "temp": 0.8, "response_length": 5, "remove_input": "true"},
        {"top-p": "0.9", "temp": "0.8", "response-length": "5", "remove-input": "1"},
        {"top_p": 1, "temperature": 0, "removeInput": True, "responseLength": 5.0},
    ],
)
def test_demo_completion(client: Client, fields: dict[str, Any]) -> None:
    (found,) = client.post("/completion", {"context": FOX, **fields}).json()
    assert found.keys() == {"generated_text"}
    assert not found["generated_text"].startswith(FOX)
    if fields.get("temperature") == 0:
        wanted = generate(FOX, temperature=0, max_tokens=5)[0].text
        assert found["generated_text"] == wanted
        fields = fields | {"removeInput": False}
        (found,) = client.post("/completion", {"context": FOX, **fields}).json()
        assert found["generated_text"] == FOX + wanted


def test_demo_errors(client: Client) -> None:
    for fields in ({}, {"context": ""}, {"context": None}):
        assert_error(client.post("/completion", fields), 400, code="NO_PROMPT")
    for fields in (
        {"seed": 1},
        {"response_length": 1.5},
        {"response_length": 500},
        {"topP": 0.9, "top_p": 0.5},
    ):
        response = client.post("/completion", {"context": "a", **fields})
        assert_error(response, 400, code="API_ERROR")
    busy = Client(app(Broken(QueueFullError("the queue is full"))))
    response = busy.post("/completion", {"context": "a"})
    assert_error(response, 503, code="RATE_LIMITED")
    assert int(response.headers["retry-after"]) >= 1


def test_while_loading() -> None:
    metrics = Metrics()
    client = Client(app(Broken(state="loading", is_loaded=False), metrics=metrics))
    for path in POSTS:
        response = client.post(path, {})
        message = assert_error(response, 503, type="unavailable_error")
        assert message == "Loading model: compiling 3 of 9"
        assert int(response.headers["retry-after"]) >= 1
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL_ID
    assert client.get("/version?limits=1").status_code == 200
    assert_error(client.get("/tokenizer_info"), 503)
    assert count(metrics, "meshlm_requests_rejected_total", reason="loading") == len(POSTS) + 1


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retries"),
    [
        (QueueFullError("the queue is full"), 429, "queue_full", True),
        (NotReadyError("draining", "later"), 503, "draining", True),
        (NotReadyError("loading", "later"), 503, "loading", True),
        (NotReadyError("failed", "broken"), 503, "engine_failed", False),
    ],
)
def test_refusals(refusal: Exception, status: int, code: str, retries: bool) -> None:
    for stream in (False, True):
        response = Client(app(Broken(refusal))).post("/v1/completions", {"stream": stream})
        assert_error(response, status, code=code)
        assert ("retry-after" in response.headers) == retries
        assert (response.headers.get("x-should-retry") == "false") != retries


@pytest.mark.parametrize(
    ("kind", "status", "code", "retries"),
    [
        ("engine", 500, "engine_error", False),
        ("deadline", 503, "timeout", False),
        ("draining", 503, "draining", True),
    ],
)
def test_failures(kind: FailureKind, status: int, code: str, retries: bool) -> None:
    piece = Piece((TokenScore(5, -0.5),), "begun")
    for stream in (False, True):
        metrics = Metrics()
        broken = Broken(piece, Failed(kind, "what happened"))
        response = Client(app(broken, metrics=metrics)).post("/v1/completions", {"stream": stream})
        if stream:
            first, last = events(response.text)
            assert first["choices"][0]["text"] == "begun"
            assert last["error"]["message"] == "what happened"
            assert last["error"]["code"] == code
        else:
            assert assert_error(response, status, code=code) == "what happened"
            assert ("retry-after" in response.headers) == retries
        assert broken.cancelled
        assert count(metrics, "meshlm_requests_finished_total", reason=kind) == 1


def test_bug() -> None:
    response = Client(app(Broken(KeyError("secret")))).post("/v1/completions", {"prompt": "a"})
    assert "secret" not in assert_error(response, 500, type="server_error")


def test_a_bug_is_in_the_log_under_its_id() -> None:
    stream = io.StringIO()
    log = LineLog(stream)
    served = protect(
        app(Broken(KeyError("secret"))), LIMITS, Metrics(), keys=Keys(()), hosts=None, log=log
    )
    response = Client(served).post("/v1/completions", {"prompt": "a"})
    log.close()
    assert "secret" not in assert_error(response, 500, code="internal_error")
    failed, request = map(json.loads, stream.getvalue().splitlines())
    assert (failed["event"], failed["error"]) == ("failed", "KeyError")
    assert "apps.py" in failed["where"][-1]
    assert failed["id"] == request["id"] == response.headers["x-request-id"]


def test_no_number_that_json_has_not(caplog: pytest.LogCaptureFixture) -> None:
    """A model that computes NaN makes an error, not a body that nobody can read."""
    script = (Piece((TokenScore(5, math.nan),), "x"), Finished("length", 0))
    fields = {"prompt": "a", "logprobs": 1}
    client = Client(app(Broken(*script)))
    assert_error(client.post("/v1/completions", fields), 500)
    broken = client.stream(**fields)
    assert broken[-1]["error"]["code"] == "internal_error"
    record = caplog.records[-1]
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError


def test_long_answers_are_written_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def spied(value: Any) -> str:
        threads.append(threading.current_thread())
        return to_json(value)

    monkeypatch.setattr("meshlm.serving.api.waiting.to_json", spied)
    tokens = [TokenScore(5, -0.5)] * 600
    script = (Piece(tuple(tokens), "\x85x\u2028y\u2029" * 200), Finished("length", 0))
    served = Client(app(Broken(*script)))
    response = served.post("/v1/completions", {"prompt": "a", "logprobs": 1, "max_tokens": 60})
    assert not any(end in response.text for end in "\x85\u2028\u2029")
    assert response.json()["choices"][0]["text"] == "\x85x\u2028y\u2029" * 200
    assert response.json()["usage"]["completion_tokens"] == 600
    assert threads
    assert threading.main_thread() not in threads


def test_long_json_is_written_fast() -> None:
    begin_s = time.process_time()
    assert len(to_json("é\u2028" * 2_000_000)) == 14_000_002
    assert time.process_time() - begin_s < 0.2


def test_metrics() -> None:
    metrics = Metrics()
    client = Client(app(metrics=metrics))
    client.complete(prompt=FOX, max_tokens=3, n=2, temperature=0)
    client.post("/v1/completions", {"n": 0})
    assert count(metrics, "meshlm_requests_total") == 1
    assert count(metrics, "meshlm_requests_finished_total", reason="length") == 1
    assert count(metrics, "meshlm_requests_rejected_total", reason="invalid") == 1
    assert count(metrics, "meshlm_time_to_first_token_seconds_count") == 1


def count(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


class Visitor:
    """A client, down to ASGI: it asks, looks at what comes, and goes when it wants to."""

    def __init__(self, served: Any, **fields: Any) -> None:
        self._app = served
        self._body = json.dumps(fields).encode()
        self._gone = asyncio.Event()
        self._has_asked = False
        self.sent: list[dict[str, Any]] = []

    async def visit(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await self._app(scope, self._receive, self._send)

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._has_asked:
            self._has_asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()


LONG = {"prompt": FOX, "max_tokens": 100, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_gone_while_it_runs(stream: bool) -> None:
    metrics = Metrics()

    async def check() -> None:
        before = engine().stats
        visitor = Visitor(app(metrics=metrics), **LONG, n=4, stream=stream)
        visit = asyncio.create_task(visitor.visit())
        await until(lambda: engine().stats.generated_tokens > before.generated_tokens)
        visitor.leave()
        steps = engine().stats.decode_steps
        await until(lambda: engine().stats.running == 0)
        # Two steps, and those between the look at the count and the word that it is gone.
        assert engine().stats.decode_steps - steps <= 6
        assert engine().stats.cancelled - before.cancelled == 4
        await visit

    asyncio.run(check())
    assert count(metrics, "meshlm_requests_finished_total", reason="cancelled") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_gone_while_it_waits(stream: bool) -> None:
    async def check() -> None:
        served = app()
        before = engine().stats
        first = [Visitor(served, **LONG, n=4) for _ in range(3)]
        waiting = Visitor(served, **LONG, n=4, stream=stream)
        visits = [asyncio.create_task(visitor.visit()) for visitor in [*first, waiting]]
        await until(lambda: engine().stats.waiting >= 4)
        waiting.leave()
        await visits[-1]
        if stream:
            assert ": queued " in waiting.text
        for visitor in first:
            visitor.leave()
        await until(lambda: engine().stats.running + engine().stats.waiting == 0)
        await asyncio.gather(*visits)
        assert engine().stats.cancelled - before.cancelled == 16

    asyncio.run(check())


def test_full_queue() -> None:
    async def check() -> None:
        served = app()
        first = [Visitor(served, **LONG, n=12) for _ in range(2)]
        visits = [asyncio.create_task(visitor.visit()) for visitor in first]
        await until(lambda: engine().stats.waiting > ENGINE.max_queue - 10)
        late = Visitor(served, **LONG, n=16)
        await late.visit()
        assert late.sent[0]["status"] == 429
        assert dict(late.sent[0]["headers"])[b"retry-after"] == b"1"
        assert json.loads(late.text)["error"]["code"] == "queue_full"
        for visitor in first:
            visitor.leave()
        await asyncio.gather(*visits)
        await until(lambda: engine().stats.running + engine().stats.waiting == 0)

    asyncio.run(check())


def test_more_samples_than_there_is_ever_room_for() -> None:
    room = ENGINE.slots + ENGINE.max_queue
    client = Client(app(limits=Limits(max_n=room + 1)))
    limits = client.get("/version?limits=1").json()["limits"]
    assert limits["max_samples"] == room
    message = assert_error(client.post("/v1/completions", {"n": room + 1}), 400, param="n")
    assert f"at most {room} " in message
    assert len(client.complete(n=room, max_tokens=1)["choices"]) == room


def test_comments_while_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlm.serving.api.waiting.QUEUE_INTERVAL_S", 0.01)
    monkeypatch.setattr("meshlm.serving.api.waiting.PING_INTERVAL_S", 0.03)

    async def check(broken: Broken, comment: str) -> None:
        visitor = Visitor(app(broken), prompt="a", stream=True)
        visit = asyncio.create_task(visitor.visit())
        await until(lambda: visitor.text.count(comment) > 2)
        visitor.leave()
        await visit
        assert broken.cancelled

    asyncio.run(check(Broken(ahead=7), ": queued 7\n\n"))
    asyncio.run(check(Broken(), ": ping\n\n"))


def test_client_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlm.serving.api.app.SEND_GRACE_S", 0.0)

    class Stuck(Visitor):
        async def _send(self, message: Any) -> None:
            await asyncio.Event().wait()

    async def check() -> None:
        broken = Broken()
        visitor = Stuck(app(broken, Limits(request_timeout_s=0.05)), prompt="a", stream=True)
        async with asyncio.timeout(10):
            await visitor.visit()
        assert broken.cancelled

    asyncio.run(check())


def test_deadline() -> None:
    slow = Client(app(limits=Limits(request_timeout_s=0.001)))
    assert_error(slow.post("/v1/completions", LONG), 503, code="timeout")


def test_schema_names_every_route(client: Client) -> None:
    schema = client.get("/openapi.json").json()
    assert {*POSTS, "/v1/models", "/version", "/tokenizer_info"} <= schema["paths"].keys()
    used = set(find_references(schema))
    known = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert used <= known


def find_references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for item in value.values() for ref in find_references(item)]
    return [r for item in value for r in find_references(item)] if isinstance(value, list) else []
