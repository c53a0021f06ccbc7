"""The API as its real clients use it, over a socket: the openai package, others, and curl."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from apps import CONTEXT, MODEL_ID, Broken, app, engine, events, listening, tokenizer
from apps import model as own_model
from meshlm.serving.engine import Submission
from meshlm.serving.requests import (
    Failed,
    NotReadyError,
    OnEvent,
    Piece,
    QueueFullError,
    Request,
    TokenScore,
)

FOX = "the quick brown fox"
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(app()) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with connect(address) as found:
        yield found


def connect(address: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", **{"max_retries": 0, **options})


def test_completion(client: openai.OpenAI) -> None:
    wanted = own_model().generate([FOX, "the dog"], seed=5, n=2, max_tokens=12)
    found = client.completions.create(
        model=MODEL_ID, prompt=[FOX, "the dog"], seed=5, n=2, max_tokens=12, logprobs=2
    )
    assert [choice.text for choice in found.choices] == [sample.text for sample in wanted]
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 4
    assert found.usage is not None
    assert found.usage.completion_tokens == 48
    assert found.system_fingerprint == "fp_test"
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 12


def test_answers_are_openais(address: str) -> None:
    """Their package does not check what it gets; here its types do."""
    fields = {"prompt": FOX, "logprobs": 2, "max_tokens": 3, "n": 2}
    answer = httpx.post(f"{address}/v1/completions", json=fields)
    checked = Completion.model_validate_json(answer.content, strict=True)
    assert not extra_fields(checked)
    fields = {"messages": HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    answer = httpx.post(f"{address}/v1/chat/completions", json=fields)
    checked = ChatCompletion.model_validate_json(answer.content, strict=True)
    assert not extra_fields(checked)
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{address}/v1/chat/completions", json=fields)
    for event in events(answer.text):
        checked = ChatCompletionChunk.model_validate_json(json.dumps(event), strict=True)
        assert not extra_fields(checked)
    answer = httpx.get(f"{address}/v1/models/{MODEL_ID}")
    checked = Model.model_validate_json(answer.content, strict=True)
    assert extra_fields(checked) == {"context_length", "vocab_size"}


def extra_fields(value: Any) -> set[str]:
    """Fields that the types do not know."""
    if isinstance(value, list):
        return {name for item in value for name in extra_fields(item)}
    if not isinstance(value, openai.BaseModel):
        return set()
    inner = [extra_fields(getattr(value, name)) for name in type(value).model_fields]
    return set(value.model_extra or {}).union(*inner)


def test_stream(client: openai.OpenAI) -> None:
    wanted = own_model().generate([FOX, "the dog"], seed=5, n=2, max_tokens=12)
    with client.completions.create(
        model=MODEL_ID,
        prompt=[FOX, "the dog"],
        seed=5,
        n=2,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        texts, reasons, usage = [""] * 4, [None] * 4, None
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            usage = chunk.usage
    assert texts == [sample.text for sample in wanted]
    assert reasons == ["length"] * 4
    assert usage is not None
    assert usage.completion_tokens == 48


def test_chat(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL_ID, "messages": HI, "seed": 4, "max_completion_tokens": 9}
    content = client.chat.completions.create(**fields).choices[0].message.content
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content
    with client.chat.completions.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == content


def test_extensions(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL_ID,
        prompt=FOX,
        temperature=0,
        max_tokens=4,
        extra_body={"top_k": 4, "min_p": 0.01, "return_token_ids": True},
    )
    extra = found.choices[0].model_extra or {}
    assert extra["prompt_token_ids"] == tokenizer().encode(FOX)
    assert len(extra["token_ids"]) == 4


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    assert client.models.retrieve(MODEL_ID).owned_by == "meshlm"


def test_errors(client: openai.OpenAI) -> None:
    complete: Any = client.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        complete(model=MODEL_ID, prompt=FOX, max_tokens=CONTEXT)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "prompt")
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="suffix"):
        complete(model=MODEL_ID, prompt=FOX, suffix="end")
    with pytest.raises(openai.NotFoundError) as missing:
        complete(model="davinci", prompt=FOX)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL_ID, input=FOX)
    tool: Any = {"type": "function", "function": {"name": "look"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=MODEL_ID, messages=HI, tools=[tool])


class Recovering:
    """The real engine, after it has refused a few times."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)

    def __getattr__(self, name: str) -> Any:
        return getattr(engine(), name)

    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> Submission:
        if self.refusals:
            raise self.refusals.pop(0)
        return engine().submit(requests, on_event)


def test_client_tries_again_when_it_is_told() -> None:
    served = Recovering(QueueFullError("the queue is full"), NotReadyError("loading", "soon"))
    with listening(app(served)) as address, connect(address, max_retries=1) as client:
        began_s = time.monotonic()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL_ID, prompt=FOX)
        # After 429 it waited for the second that it was told; after 503 its tries were used up.
        assert time.monotonic() - began_s >= 1
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "5"
        assert client.completions.create(model=MODEL_ID, prompt=FOX).choices


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (Broken(NotReadyError("failed", "no")), openai.InternalServerError),
        (Broken(Failed("engine", "no")), openai.InternalServerError),
        (Broken(Failed("deadline", "no")), openai.InternalServerError),
    ],
)
def test_client_does_not_try_again_in_vain(broken: Broken, error: type[Exception]) -> None:
    with (
        listening(app(broken)) as address,
        connect(address, max_retries=3) as client,
        pytest.raises(error),
    ):
        client.completions.create(model=MODEL_ID, prompt=FOX)
    assert broken.submitted == 1


def test_error_inside_a_stream() -> None:
    broken = Broken(Piece((TokenScore(5, -0.5),), "begun"), Failed("engine", "it broke"))
    with listening(app(broken)) as address, connect(address) as client:
        stream = client.completions.create(model=MODEL_ID, prompt=FOX, stream=True)
        assert next(stream).choices[0].text == "begun"
        with pytest.raises(openai.APIError, match="it broke"):
            next(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_frees_its_slot(address: str, stream: bool) -> None:
    """Over a socket: what the tests of the application do without one."""
    before = engine().stats
    fields = {"prompt": FOX, "max_tokens": 100, "n": 16, "ignore_eos": True, "stream": stream}
    body = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait(lambda: engine().stats.generated_tokens > before.generated_tokens)
    wait(lambda: engine().stats.running + engine().stats.waiting == 0)
    after = engine().stats
    assert after.cancelled - before.cancelled > 0
    ended = after.cancelled + after.finished - before.cancelled - before.finished
    assert (ended, after.failed) == (16, before.failed)


def wait(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


# Clients that others wrote, each in a process of its own, get what `Model.generate` gives.

SCRIPTS = Path(__file__).resolve().parents[1] / "clients"
CLIENTS = {"openai": "openai", "langchain": "langchain_openai", "litellm": "litellm", "llm": "llm"}
# .venv has them all; .venv-parity has openai alone.
INSTALLED = [name for name, module in CLIENTS.items() if importlib.util.find_spec(module)]
PROMPT, SYSTEM, USER, MORE = "the quick brown fox", "Be kind.", "hi", "and the dog?"
STOP = ("\n\nUser:", "\nUser:")


@pytest.fixture(scope="module")
def clients(address: str) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All at once, for most of their time is that of importing them."""
    asked = {
        "prompt": PROMPT,
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}],
        "more": MORE,
        "seed": -1,
        "max_tokens": 8,
    }
    started = {
        name: subprocess.Popen(
            [sys.executable, SCRIPTS / f"ask_{name}.py", address, json.dumps(asked)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in INSTALLED
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def generated(prompt: str, *stop: str) -> str:
    (sample,) = own_model().generate(prompt, seed=-1, max_tokens=8, stop=stop)
    return sample.text


@pytest.mark.long
@pytest.mark.parametrize("name", CLIENTS)
def test_client_of_others(clients: dict[str, subprocess.Popen[bytes]], name: str) -> None:
    if name not in clients:
        pytest.skip(f"there is no {name} here")
    out, err = clients[name].communicate(timeout=120)
    assert clients[name].returncode == 0, err.decode()
    text = generated(PROMPT)
    talk = f"{SYSTEM}\n\nUser: {USER}\n\nAssistant:"
    chat = generated(talk, *STOP).removeprefix(" ")
    second = generated(f"{talk} {chat}\n\nUser: {MORE}\n\nAssistant:", *STOP).removeprefix(" ")
    assert len({text, chat, second, ""}) == 4
    kinds: dict[str, list[str]] = {}
    for kind, found in json.loads(out).items():
        kinds.setdefault(kind.partition("_")[0], []).append(found)
        if kind.startswith("refused"):
            assert "is not supported here" in found
            assert "400" in found or "Bad" in found
    assert {name: set(kinds[name]) for name in ("text", "chat", "second")} == {
        "text": {text},
        "chat": {chat},
        "second": {second},
    }
    assert kinds["refused"]


PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving-api.md"
FENCE = re.compile(r"^```(python|console no-run)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples(wanted: str) -> list[str]:
    """The page's examples of a kind that ask a server."""
    texts = [text for kind, text in FENCE.findall(PAGE.read_text()) if kind == wanted]
    if wanted == "python":
        return texts
    return [line[2:] for text in texts for line in text.splitlines() if line.startswith("$ curl")]


def at(address: str, example: str) -> str:
    return example.replace("http://127.0.0.1:8000", address).replace('"first"', f'"{MODEL_ID}"')


@pytest.mark.parametrize("example", examples("python"), ids=["completions", "chat"])
def test_python_of_the_docs(address: str, example: str, capsys: pytest.CaptureFixture) -> None:
    exec(at(address, example), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl_of_the_docs(address: str) -> None:
    commands = examples("console no-run")
    assert len(commands) == 5
    for example in commands:
        command = at(address, example).replace("curl", "curl -sS --fail-with-body")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(address: str) -> None:
    body = json.dumps({"prompt": FOX, "max_tokens": 3, "temperature": 0, "stream": True})
    command = ["curl", "-sS", "-N", f"{address}/v1/completions", "--json", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    text = "".join(event["choices"][0]["text"] for event in events(done.stdout))
    wanted = own_model().generate([FOX, "the dog"], temperature=0, n=2, max_tokens=3)
    assert text == wanted[0].text
    command = ["curl", "-sS", f"{address}/v1/completions", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "Content-Type: application/json" in json.loads(done.stdout)["error"]["message"]
