"""From bytes to checked fields: what is no request is refused by name, soon, and cheaply."""

from __future__ import annotations

import json
import re
import time
import typing
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from apps import CONTEXT, tokenizer
from meshlm.core.strict_json import MAX_DEPTH
from meshlm.data.special_tokens import SpecialTokens
from meshlm.serving.api.bodies import parse_object
from meshlm.serving.api.chat import text_of
from meshlm.serving.api.prompts import Vocabulary, read_prompts
from meshlm.serving.api.protocol import (
    UNUSED,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    StreamOptions,
    Strict,
    TextPart,
    check_sampling,
    read_fields,
    read_logit_bias,
    read_stop,
)
from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError

LIMITS = Limits()
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def parse(body: bytes) -> dict:
    return parse_object(body, LIMITS, 2048)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans())
@example({"a": 'q\\"[{' * 100}, False)
@example({"emoji": "😀"}, True)
def test_json_comes_through(value: dict, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200) | st.text('[]{}",:\\u0019e+-. tfn', max_size=60).map(str.encode))
def test_other_bytes_are_refused_as_json_refuses_them(body: bytes) -> None:
    try:
        wanted = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        wanted = None
    try:
        found = parse(body)
    except ValueError:
        return
    assert found == wanted


BAD = {
    "nothing": (b"", "not JSON"),
    "text": (b'"x"', "a text"),
    "list": (b"[]", "a list"),
    "number": (b"42", "a number"),
    "null": (b"null", "null"),
    "true": (b"true", "true or false"),
    "cut": (b'{"prompt": "a', "not JSON"),
    "two": (b"{} {}", "not JSON"),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not JSON"),
    "mark inside": (b"{\xef\xbb\xbf}", "not JSON"),
    "nan": (b'{"temperature": NaN}', "NaN"),
    "infinity": (b'{"temperature": Infinity}', "Infinity"),
    "minus infinity": (b'{"temperature": -Infinity}', "-Infinity"),
    "huge float": (b'{"temperature": 1e999}', "1e999"),
    "huge float, negative": (b'{"a": [-1e999]}', "-1e999"),
    "huge integer": (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
    "key twice": (b'{"n": 1, "n": 2}', "'n' twice"),
    "inner key twice": (b'{"a": [{"b": 1, "b": 1}]}', "'b' twice"),
    "not UTF-8": (b'{"prompt": "\xff"}', "UTF-8 at byte 12"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"),
    "surrogate": (b'{"a": [{"b": "\\ud800"}]}', "U+D800"),
    "surrogate key": (b'{"\\uDFFF": 1}', "U+DFFF"),
    "deep": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"than {MAX_DEPTH} deep"),
}


@pytest.mark.parametrize("name", BAD)
def test_body_is_refused(name: str) -> None:
    body, words = BAD[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(body)


def test_byte_order_mark_before_the_object_is_no_part_of_it() -> None:
    assert parse(b'\xef\xbb\xbf{"prompt": "\xef\xbb\xbfa"}') == {"prompt": "\ufeffa"}


def test_depth_allowed() -> None:
    body = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert parse(body)


COSTLY = {
    "deep": b"[" * 10_000 + b"]" * 10_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "open lists": b"[" * 2_000_000,
    "empty lists": b'{"prompt":[' + b"[]," * 600_000 + b"[]]}",
    "texts": b'{"stop":[' + b'"a",' * 500_000 + b'"a"]}',
    "prompts": b'{"prompt":[' + b'"",' * 600_000 + b'""]}',
    "ids": b'{"prompt":[' + b"1," * 1_000_000 + b"1]}",
    "digits": b'{"n":' + b"9" * 1_000_000 + b"}",
    "many digits": b'{"prompt":[' + (b"9" * 4000 + b",") * 500 + b"1]}",
    "bias": json.dumps({"logit_bias": {str(i): 1 for i in range(100_000)}}).encode(),
    "fields": json.dumps({f"field{i}": 1 for i in range(100_000)}).encode(),
    "inner fields": json.dumps({"messages": [{f"a{i}": 1 for i in range(8000)}]}).encode(),
    "mixed": json.dumps({"prompt": [*range(100_000), "a"]}).encode(),
    "mixed texts": json.dumps({"prompt": [*["a"] * 100_000, 1]}).encode(),
    "huge": b'{"n":1000000000,"best_of":1000000000,"max_tokens":1000000000000,"logprobs":1000000}',
}


@pytest.mark.parametrize("name", COSTLY)
def test_refusal_is_cheap(name: str) -> None:
    body = COSTLY[name]
    process = psutil.Process()
    refuse(body)  # what a first call needs is there from now on
    before, began_s = process.memory_info().rss, time.thread_time()
    message = refuse(body)
    assert time.thread_time() - began_s < 0.1
    assert process.memory_info().rss - before < 10 << 20
    assert len(message) < 600


def refuse(body: bytes) -> str:
    """Why the body is refused, by whichever step."""
    try:
        data = parse(body)
    except ValueError as error:
        return str(error)
    with pytest.raises(ApiError) as caught:
        check(data)
    assert caught.value.status == 400
    return str(caught.value)


def check(data: dict) -> None:
    fields = read_fields(ChatRequest if "messages" in data else CompletionRequest, data)
    check_sampling(fields, LIMITS)
    read_prompts(data.get("prompt"), vocabulary(), LIMITS)


def vocabulary() -> Vocabulary:
    own = tokenizer()
    return Vocabulary(
        tokenizer=own,
        special_tokens=SpecialTokens.of(own),
        size=own.vocab_size,
        context_length=CONTEXT,
    )


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from([*CompletionRequest.model_fields, "x"]), VALUES, max_size=3))
def test_fields_are_taken_or_refused_by_name(data: dict) -> None:
    error = None
    try:
        read_fields(CompletionRequest, data)
    except ApiError as caught:
        error = caught
    if error is not None:
        param, message = error.param or "", str(error)
        assert param.split(".")[0] in data
        assert param.split(".")[0] in message
        assert "\n" not in message
        assert len(message) < 600


WRONG_FIELDS = [
    ({"n": True}, "n", "True"),
    ({"n": 1.0}, "n", "1.0"),
    ({"n": "1"}, "n", "'1'"),
    ({"temperature": True}, "temperature", "True"),
    ({"temperature": "1"}, "temperature", "'1'"),
    ({"temperature": 10**400}, "temperature", "digits"),
    ({"echo": 1}, "echo", "1"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"best_off": 1}, "best_off", "not supported"),
    ({"seed": 1.0}, "seed", "1.0"),
    ({"logit_bias": {"5": True}}, "logit_bias.5", "True"),
    ({"logit_bias": [1]}, "logit_bias", "[1]"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "not supported"),
]


@pytest.mark.parametrize(("data", "param", "words"), WRONG_FIELDS)
def test_field_is_refused(data: dict, param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_fields(CompletionRequest, data)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in str(caught.value)
    assert words in str(caught.value)


OUT_OF_BOUNDS = [
    ({"n": 0}, "16"),
    ({"n": 17}, "16"),
    ({"n": 10**9}, "16"),
    ({"temperature": -0.1}, "2"),
    ({"temperature": 2.1}, "2"),
    ({"top_p": 0}, "1"),
    ({"top_p": 1.01}, "1"),
    ({"min_p": -0.1}, "1"),
    ({"top_k": -2}, "-1"),
    ({"repetition_penalty": 0}, "0.01"),
    ({"presence_penalty": 2.5}, "2"),
    ({"frequency_penalty": -2.5}, "-2"),
    ({"seed": -(2**63) - 1}, "-9223372036854775808"),
    ({"seed": 2**63}, "9223372036854775807"),
    ({"max_tokens": -1}, "0"),
    ({"truncate_prompt_tokens": 0}, "1"),
    ({"stream_options": {"include_usage": True}}, "stream"),
]


@pytest.mark.parametrize(("data", "limit"), OUT_OF_BOUNDS)
def test_bound_is_named(data: dict, limit: str) -> None:
    (name,) = data
    with pytest.raises(ApiError) as caught:
        check_sampling(read_fields(SamplingFields, data), LIMITS)
    assert (caught.value.status, caught.value.param) == (400, name)
    assert name in str(caught.value)
    assert limit in str(caught.value)


INSIDE = [
    {"n": 16, "temperature": 2, "top_p": 1, "min_p": 1, "top_k": -1, "seed": 2**63 - 1},
    {"n": 1, "temperature": 0, "top_p": 1e-300, "min_p": 0, "top_k": 10**12, "seed": -(2**63)},
    {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 100, "max_tokens": 0},
    {"user": "somebody", "metadata": {"any": ["thing", {}]}, "model": None, "stop": None},
    {"safety_identifier": "somebody", "prompt_cache_key": "a key"},
    {"stream_options": {}, "stop": [], "logit_bias": {}},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    dict.fromkeys([*SamplingFields.model_fields, "a_field_of_another_server"]),
]


@pytest.mark.parametrize("data", INSIDE)
def test_bounds_are_inside(data: dict) -> None:
    check_sampling(read_fields(SamplingFields, data), LIMITS)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (5, "stop"),
        ("", "stop"),
        ([""], "stop[0]"),
        (["a", None], "stop[1]"),
        (["a"] * 17, "stop"),
        (["a", "b" * 257], "stop[1]"),
        ("b" * 257, "stop"),
        ({"a": 1}, "stop"),
    ],
)
def test_stop_is_refused(value: object, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_stop(value, LIMITS)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_stop_is_taken() -> None:
    assert read_stop(None, LIMITS) == ()
    assert read_stop([], LIMITS) == ()
    assert read_stop("a", LIMITS) == ("a",)
    texts = ["b" * 256, *map(str, range(15))]
    assert read_stop(texts, LIMITS) == tuple(texts)


# What OpenAI's package can send: each of its fields is honoured, neutral or refused.

REQUESTS = {
    CompletionRequest: (
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    ChatRequest: (
        chat_create_params.CompletionCreateParamsNonStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
    ),
    ChatMessage: (
        chat.ChatCompletionAssistantMessageParam,
        chat.ChatCompletionDeveloperMessageParam,
        chat.ChatCompletionSystemMessageParam,
        chat.ChatCompletionUserMessageParam,
    ),
    TextPart: (chat.ChatCompletionContentPartTextParam,),
    StreamOptions: (chat.ChatCompletionStreamOptionsParam,),
}
NEUTRAL = [
    (kind, name, value)
    for kind in REQUESTS
    for name, values in kind.neutral.items()
    for value in (None, *values)
]
# A value of each that would change the answer, as openai's types have it.
CHANGES = {
    "annotations": [{"type": "url_citation"}],
    "audio": {"format": "mp3", "voice": "ash"},
    "function_call": {"name": "look"},
    "functions": [{"name": "look"}],
    "include_obfuscation": True,
    "modalities": ["text", "audio"],
    "moderation": {"model": "any"},
    "parallel_tool_calls": 1,
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_breakpoint": {"mode": "explicit"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_content": "because",
    "reasoning_effort": "low",
    "refusal": "no",
    "response_format": {"type": "json_object"},
    "service_tier": "priority",
    "store": 0,
    "suffix": "end",
    "tool_calls": [{"id": "1"}],
    "tool_choice": "required",
    "tools": [{"type": "function"}],
    "verbosity": "high",
    "top_logprobs": 1,
    "best_of": 2,
    "echo": True,
    "web_search_options": {},
}


def within(kind: type[Strict], fields: dict) -> tuple[type[Strict], dict]:
    """The request that has these fields in a place of that kind."""
    user = {"role": "user", "content": "a"}
    if kind is ChatMessage:
        return ChatRequest, {"messages": [user | {"role": "assistant"} | fields]}
    if kind is TextPart:
        part = {"type": "text", "text": "a"} | fields
        return ChatRequest, {"messages": [user | {"content": [part]}]}
    if kind is StreamOptions:
        return CompletionRequest, {"stream": True, "stream_options": fields}
    return kind, fields | ({"messages": [user]} if kind is ChatRequest else {})


@pytest.mark.parametrize("kind", REQUESTS)
def test_each_field_of_openais_types_is_known(kind: type[Strict]) -> None:
    theirs = {name for params in REQUESTS[kind] for name in typing.get_type_hints(params)}
    if kind is ChatMessage:  # an answer, sent back
        theirs |= chat.ChatCompletionMessage.model_fields.keys()
    assert theirs - kind.model_fields.keys() - kind.neutral.keys() == set()
    assert not kind.neutral.keys() & kind.model_fields.keys()


@pytest.mark.parametrize(("kind", "name", "value"), NEUTRAL)
def test_neutral_value_is_as_if_left_out(kind: type[Strict], name: str, value: object) -> None:
    request, fields = within(kind, {name: value})
    assert read_fields(request, fields) == read_fields(request, within(kind, {})[1])


@pytest.mark.parametrize(("kind", "name"), [case[:2] for case in NEUTRAL if case[2] is None])
def test_other_value_is_refused(kind: type[Strict], name: str) -> None:
    request, fields = within(kind, {name: CHANGES[name]})
    with pytest.raises(ApiError, match="not supported") as caught:
        read_fields(request, fields)
    assert caught.value.status == 400
    assert (caught.value.param or "").endswith(name)
    values = kind.neutral[name]
    assert not values or json.dumps(values[0]) in str(caught.value)


def test_schema_has_the_neutral_values() -> None:
    for kind in REQUESTS:
        properties = kind.model_json_schema()["properties"]
        for name, values in kind.neutral.items():
            assert properties[name]["enum"] == [*values, None]


WHERE = {SamplingFields: "both", ChatMessage: "a message"}
WHERE |= {CompletionRequest: "a completion", ChatRequest: "a chat"}
WHERE |= {TextPart: "a part of `content`", StreamOptions: "`stream_options`"}


def test_docs_have_the_neutral_values() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving-api.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page.partition("## Neutral")[2], re.M)
    values = [
        (name, WHERE[kind], ", ".join(f"`{json.dumps(value)}`" for value in values) or "none")
        for kind in WHERE
        for name, values in kind.neutral.items()
        if kind not in (CompletionRequest, ChatRequest) or name not in SamplingFields.neutral
    ]
    assert sorted(told) == sorted(values)
    for name in (name for names in UNUSED.values() for name in names):
        assert f"`{name}`" in page


NO_CONTENT = [
    {"role": "assistant"},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": []},
    {"role": "assistant", "content": None, "id": "msg_1", "name": "a", "refusal": None},
]


@pytest.mark.parametrize("message", NO_CONTENT)
def test_answer_without_content_is_an_empty_text(message: dict) -> None:
    (found,) = read_fields(ChatRequest, {"messages": [message]}).messages
    assert text_of(found) == ""


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_other_message_needs_content(role: str, content: dict) -> None:
    with pytest.raises(ApiError) as caught:
        read_fields(ChatRequest, {"messages": [{"role": role, **content}]})
    assert (caught.value.param or "").startswith("messages[0].content")


@pytest.mark.parametrize(
    "bias",
    [
        *({key: 1.0} for key in ("x", "-1", "60", "1.0", "", "٣", "²", " 5", "9" * 5000)),
        {"5": 101.0},
        {"5": -101.0},
        {"5": 1.0, "05": 2.0},
        {str(i): 1.0 for i in range(1025)},
    ],
)
def test_bias_is_refused(bias: dict[str, float]) -> None:
    with pytest.raises(ApiError) as caught:
        read_logit_bias(bias, 60, LIMITS)
    assert caught.value.param is not None
    assert caught.value.param.startswith("logit_bias")
    assert len(str(caught.value)) < 300


def test_bias_is_taken() -> None:
    assert read_logit_bias({"0": -100, "59": 100.0}, 60, LIMITS) == {0: -100, 59: 100.0}


@given(
    st.none()
    | st.text(max_size=20)
    | st.lists(st.text(max_size=20), min_size=1, max_size=5)
    | st.lists(st.integers(0, 290), min_size=1, max_size=9)
    | st.lists(st.lists(st.integers(0, 290), min_size=1, max_size=9), min_size=1, max_size=5)
)
def test_four_forms_of_a_prompt(value: object) -> None:
    found = read_prompts(value, vocabulary(), LIMITS)
    own = tokenizer()
    is_one = not isinstance(value, list) or isinstance(value[0], int)
    for given_prompt, prompt in zip([value] if is_one else value, found, strict=True):
        if isinstance(given_prompt, list):
            assert list(prompt.tokens) == given_prompt
            assert prompt.text == own.decode(given_prompt)
        else:
            assert list(prompt.tokens) == (own.encode(given_prompt or "") or [own.end_of_text_id])
            assert prompt.text == (given_prompt or "")


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([[1], []], "prompt[1]"),
        (5, "prompt"),
        (True, "prompt"),
        ({}, "prompt"),
        ([True], "prompt[0]"),
        ([1, True], "prompt[1]"),
        ([1.5], "prompt[0]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        (["a", [1]], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], 1], "prompt[1]"),
        ([[[1]]], "prompt[0][0]"),
        ([None], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([1, 10**4], "prompt[1]"),
        ([[1], [1, 10**30]], "prompt[1][1]"),
        (["a"] * 65, "prompt"),
        ([[1]] * 65, "prompt"),
    ],
)
def test_prompt_is_refused(value: object, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_prompts(value, vocabulary(), LIMITS)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in str(caught.value)


def test_prompt_is_cut_where_asked() -> None:
    (prompt,) = read_prompts([5, 6, 7, 8], vocabulary(), LIMITS, keep=3)
    assert prompt.tokens == (6, 7, 8)
    assert prompt.text == tokenizer().decode([6, 7, 8])
