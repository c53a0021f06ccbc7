"""Requests that nobody would write: never a 5xx, errors in OpenAI's form, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from apps import Client, app, assert_error, engine, events
from meshlm.serving.api.protocol import ChatRequest, CompletionRequest
from meshlm.serving.config import Limits

# Small limits: what is taken is answered soon.
SERVED = app(limits=Limits(max_prompts=3, max_n=3, max_best_of=3, max_samples=8, max_stop=2))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", SERVED)
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
PROBE = {"prompt": "the quick brown fox", "seed": 1, "max_tokens": 8, "logprobs": 2}
POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/complete",
    "/completion",
)
QUICK = settings(max_examples=8, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=400, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def as_before() -> Iterator[None]:
    """After all of it a completion is what it was, and no request is left in the engine."""
    client = Client(SERVED)
    before = client.complete(**PROBE)["choices"]
    yield
    assert client.complete(**PROBE)["choices"] == before
    assert (engine().stats.running, engine().stats.waiting, engine().state) == (0, 0, "ready")


def check_answer(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert_error(response, response.status_code)
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert all("error" not in event for event in events(response.text))
    else:
        assert isinstance(response.json(), dict | list)


def check_case(case: Any) -> None:
    response = case.call()
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}


@SCHEMA.parametrize()
@QUICK
def test_schema(case: Any) -> None:
    check_case(case)


@pytest.mark.long
@SCHEMA.parametrize()
@LONG
def test_schema_at_length(case: Any) -> None:
    check_case(case)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(0, 2)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": VALUES}
    )
    | VALUES,
    max_size=3,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 310), max_size=6),
    "messages": MESSAGES,
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 310).map(str), st.floats(-101, 101), max_size=4),
    "max_tokens": st.integers(-1, 20),
    "model": st.sampled_from(["tiny", None, "other"]),
    "suffix": st.none(),
    "user": st.text(max_size=4),
    "metadata": st.dictionaries(st.text(max_size=4), SCALARS, max_size=3),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
}


def bodies(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies whose fields are mostly of the right type and seldom all good."""

    def values(name: str) -> st.SearchStrategy[Any]:
        annotation = str(kind.model_fields[name].annotation)
        is_float, is_int = "float" in annotation, "int" in annotation
        number = st.floats(0.01, 1) if is_float else st.integers(0, 3)
        likely = LIKELY.get(name, number if is_float or is_int else st.booleans())
        # Of ten values nine are likely: a request with many fields gets through now and then.
        return st.integers(0, 9).flatmap(lambda i: likely if i else VALUES)

    fields = {name: values(name) for name in kind.model_fields}
    few = st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True)
    return few.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))


def check_body(path: str, body: dict[str, Any]) -> None:
    body = {"max_tokens": 2, **body}
    check_answer(Client(SERVED).request("POST", path, content=json.dumps(body), headers=JSON))


JSON = {"content-type": "application/json"}


@settings(QUICK, max_examples=60)
@given(bodies(CompletionRequest))
def test_completions(body: dict[str, Any]) -> None:
    check_body("/v1/completions", body)


@settings(QUICK, max_examples=40)
@given(bodies(ChatRequest))
def test_chat(body: dict[str, Any]) -> None:
    check_body("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **body})


@pytest.mark.long
@settings(LONG, max_examples=4000)
@given(bodies(CompletionRequest))
def test_completions_at_length(body: dict[str, Any]) -> None:
    check_body("/v1/completions", body)


@pytest.mark.long
@settings(LONG, max_examples=2000)
@given(bodies(ChatRequest))
def test_chat_at_length(body: dict[str, Any]) -> None:
    check_body("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **body})


RAW = st.binary(max_size=60) | st.text('[]{}",:\\u0019e+-. aeflnrstu', max_size=60).map(str.encode)
HEADERS = st.sampled_from(
    [JSON, {}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=utf-16"}]
)


@settings(QUICK, max_examples=30)
@given(st.sampled_from(POSTS), RAW, HEADERS)
def test_bytes(path: str, body: bytes, headers: dict[str, str]) -> None:
    check_answer(Client(SERVED).request("POST", path, content=body, headers=headers))


@pytest.mark.long
@settings(LONG, max_examples=3000)
@given(st.sampled_from(POSTS), RAW, HEADERS)
def test_bytes_at_length(path: str, body: bytes, headers: dict[str, str]) -> None:
    check_answer(Client(SERVED).request("POST", path, content=body, headers=headers))
