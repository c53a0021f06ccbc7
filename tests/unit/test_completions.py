"""From fields to the engine's requests, and from recorded events to answers: no engine runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps import CONTEXT, tokenizer
from meshlm.data.special_tokens import SpecialTokens
from meshlm.serving.api.answers import Answer, Frame
from meshlm.serving.api.chat import chat_choices, plan_chat, render
from meshlm.serving.api.completions import completion_choices, plan_completion
from meshlm.serving.api.logprobs import token_name
from meshlm.serving.api.plans import Plan
from meshlm.serving.api.prompts import Vocabulary
from meshlm.serving.api.protocol import ChatRequest, CompletionRequest, read_fields
from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError
from meshlm.serving.requests import Event, Finished, Piece, PromptScores, Request, TokenScore

LIMITS = Limits()
FRAME = Frame(id="x", created=1, model="m", fingerprint="f", kind="whole", chunk_kind="chunk")
VOCABULARY = Vocabulary(
    tokenizer=tokenizer(),
    special_tokens=SpecialTokens.of(tokenizer()),
    size=tokenizer().vocab_size,
    context_length=CONTEXT,
)


def plan_of(**fields: Any) -> Plan:
    return plan_completion(read_fields(CompletionRequest, fields), VOCABULARY, LIMITS)


def plan_of_chat(**fields: Any) -> Plan:
    return plan_chat(read_fields(ChatRequest, fields), VOCABULARY, LIMITS)


def answer_of(events: Sequence[tuple[int, Event]], **fields: Any) -> tuple[Answer, list]:
    """The answer to recorded events, and what a stream of it sends."""
    request = read_fields(CompletionRequest, fields)
    plan = plan_completion(request, VOCABULARY, LIMITS)
    answer = Answer(plan, completion_choices(plan, request, VOCABULARY.tokenizer), FRAME)
    sent = [chunk for index, event in events for chunk in answer.take(index, event)]
    return answer, sent


def pieces(tokens: Sequence[int], *, sizes: Sequence[int] = ()) -> list[Event]:
    """Tokens as events, so many at a time, each piece with the text of its bytes."""
    cut, events = list(tokens), []
    for size in [*sizes, len(cut)]:
        part, cut = cut[:size], cut[size:]
        scores = tuple(TokenScore(token, -0.5 - token / 1000, ((token, -0.25),)) for token in part)
        events.append(Piece(scores, VOCABULARY.tokenizer.decode(part)))
    return events


def test_defaults() -> None:
    (request,) = plan_of(prompt=[5, 6]).requests
    wanted = Request(prompt=(5, 6))
    assert 0 <= request.seed < 2**32
    assert request.deadline_s is not None
    assert dataclasses.replace(request, seed=0, deadline_s=None) == wanted
    assert wanted.max_tokens == 16
    assert wanted.temperature == 1
    assert plan_of(prompt=[5]).requests[0].seed != request.seed


def test_every_field_reaches_the_engine() -> None:
    (request,) = plan_of(
        prompt=[5],
        max_tokens=7,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"9": -100},
        seed=11,
        stop="x",
        ignore_eos=True,
        logprobs=4,
        echo=True,
    ).requests
    assert dataclasses.replace(request, deadline_s=None) == Request(
        prompt=(5,),
        max_tokens=7,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={9: -100},
        seed=11,
        stop=("x",),
        ignore_end_of_text=True,
        alternatives=4,
        score_prompt=True,
    )


def test_neutral_values_set_no_limit() -> None:
    for fields in ({"top_k": -1, "top_p": 1}, {"top_k": 0, "top_p": None}):
        (request,) = plan_of(prompt="a", **fields).requests
        assert request.top_k is None
        assert request.top_p is None
    (request,) = plan_of(prompt="a", top_k=10**9, top_p=1e-300).requests
    assert request.top_k == VOCABULARY.size
    assert request.top_p is not None
    assert 0 < request.top_p < 1 / VOCABULARY.size
    assert request.top_p > 1e-38, "0 in float32"


def test_prompts_come_first_in_the_order() -> None:
    requests = plan_of(prompt=[[5], [6]], n=2, best_of=3, seed=1).requests
    found = [(r.prompt, r.prompt_index, r.sample_index, r.seed) for r in requests]
    assert found == [((p,), p - 5, s, 1) for p in (5, 6) for s in range(3)]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": -1}, "logprobs", "0"),
        ({"n": 3, "best_of": 2}, "best_of", "n is 3"),
        ({"best_of": 0}, "best_of", "16"),
        ({"best_of": 17}, "best_of", "16"),
        ({"best_of": 10**9}, "best_of", "16"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"prompt": ["a"] * 20, "n": 10}, "n", "128"),
        ({"prompt": ["a"] * 20, "best_of": 10}, "best_of", "128"),
    ],
)
def test_completion_is_refused(fields: dict, param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        plan_of(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in str(caught.value)


def test_context_is_kept() -> None:
    assert plan_of(prompt=[5] * 100, max_tokens=28).requests[0].max_tokens == 28
    assert plan_of(prompt=[5] * CONTEXT, max_tokens=0).requests
    for fields in ({"prompt": [5] * 100, "max_tokens": 29}, {"prompt": [5] * 113}):
        with pytest.raises(ApiError) as caught:
            plan_of(**fields)
        assert caught.value.code == "context_length_exceeded"
        total = len(fields["prompt"]) + fields.get("max_tokens", 16)
        assert f" {CONTEXT} " in str(caught.value)
        assert f" {total}: " in str(caught.value)
    cut = plan_of(prompt=[*range(100), *range(100)], max_tokens=28, truncate_prompt_tokens=100)
    assert cut.requests[0].prompt == tuple(range(100))
    with pytest.raises(ApiError, match="context"):
        plan_of(prompt="a", max_tokens=10**12)


def test_what_is_told_is_bounded() -> None:
    long = dataclasses.replace(VOCABULARY, context_length=2048)

    def ask(**fields: Any) -> Plan:
        request = read_fields(CompletionRequest, fields)
        return plan_completion(request, long, LIMITS)

    # As lm_eval asks: all prompts of a request, each as long as the context.
    full = {"prompt": [[5] * 2047] * 64, "max_tokens": 1, "echo": True}
    assert len(ask(**full, logprobs=1).requests) == 64
    assert ask(**full).requests
    assert ask(prompt=[[5]] * 64, max_tokens=16, logprobs=20, n=2).requests
    for fields in (full | {"logprobs": 20}, {"max_tokens": 2000, "n": 16, "logprobs": 20}):
        with pytest.raises(ApiError, match="1048576") as caught:
            ask(**{"prompt": [[5]] * 4, **fields})
        assert caught.value.param == "logprobs"


def test_names_of_tokens_are_their_own() -> None:
    own = VOCABULARY.tokenizer
    names = [token_name(own, token) for token in range(own.vocab_size)]
    assert len(set(names)) == len(names)
    for token, name in enumerate(names):
        data = own.token_bytes(token)
        if name.startswith("bytes:"):
            assert bytes.fromhex(name[6:].replace("\\x", "")) == data
        else:
            assert name.encode() == data
    assert any(name.startswith("bytes:\\x") for name in names)


def test_logprobs_with_echo() -> None:
    own = VOCABULARY.tokenizer
    prompt = own.encode("é\U0001f600a")
    text = own.decode(prompt)
    scores = tuple(TokenScore(t, -1.0 - t, ((3, -0.5), (4, -0.75))) for t in prompt[1:])
    end = TokenScore(own.end_of_text_id, -0.125, ((own.end_of_text_id, -0.25), (3, -2.0)))
    events = [(0, PromptScores(scores)), (0, Piece((end,), "")), (0, Finished("stop", 1))]
    answer, sent = answer_of(
        events, prompt=prompt, echo=True, logprobs=2, max_tokens=1, stream=True
    )
    (choice,) = answer.whole()["choices"]
    found = choice["logprobs"]
    assert choice["text"] == text == sent[0]["choices"][0]["text"]
    assert {len(values) for values in found.values()} == {len(prompt) + 1}
    assert found["token_logprobs"] == [None, *(-1.0 - t for t in prompt[1:]), -0.125]
    assert found["top_logprobs"][0] is None
    for name, log_prob, top in list(zip(*list(found.values())[:3], strict=True))[1:]:
        assert top[name] == log_prob
        assert len(top) in (2, 3)
    # An end-of-text has no text, but a place.
    assert found["text_offset"][-1] == len(text)
    before = [own.decode(prompt[:i]).rstrip("\ufffd") for i in range(len(prompt))]
    assert found["text_offset"][:-1] == [len(part) for part in before]


def test_logprobs_of_zero_tell_what_was_sampled() -> None:
    events = [(0, Piece((TokenScore(5, -0.5), TokenScore(6, float("-inf"))), "x"))]
    answer, _ = answer_of([*events, (0, Finished("length", 0))], prompt="a", logprobs=0)
    found = answer.whole()["choices"][0]["logprobs"]
    names = [token_name(VOCABULARY.tokenizer, token) for token in (5, 6)]
    assert found["tokens"] == names
    assert found["top_logprobs"] == [{names[0]: -0.5}, {names[1]: -9999.0}]
    json.dumps(answer.whole(), allow_nan=False)


def test_echo_alone() -> None:
    answer, sent = answer_of(
        [(0, Finished("length", 0))], prompt="the fox", echo=True, max_tokens=0, stream=True
    )
    assert [chunk["choices"][0]["text"] for chunk in sent] == ["the fox", ""]
    whole = answer.whole()
    assert whole["choices"][0]["text"] == "the fox"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0


def test_best_of_gives_the_best_first() -> None:
    def sample(index: int, *log_probs: float) -> list[tuple[int, Event]]:
        scores = tuple(TokenScore(5, p) for p in log_probs)
        text = ",".join(map(str, log_probs))
        return [(index, Piece(scores, text)), (index, Finished("stop", index))]

    events = [
        *sample(0, -1.0, -1.0, -1.0),
        *sample(1, -2.0),
        *sample(2, -0.5, -0.75),
        *sample(3, -3.0),
        *sample(4),
        *sample(5, -2.5),
    ]
    answer, _ = answer_of(events, prompt=["a", "b"], n=2, best_of=3)
    whole = answer.whole()
    found = [(choice["index"], choice["text"]) for choice in whole["choices"]]
    assert found == [(0, "-0.5,-0.75"), (1, "-1.0,-1.0,-1.0"), (2, "-2.5"), (3, "-3.0")]
    # Every sample was generated, each prompt read once.
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 8,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


TOKENS = st.lists(st.integers(0, tokenizer().vocab_size - 1), max_size=12)


@settings(max_examples=60)
@given(
    samples=st.lists(
        st.tuples(TOKENS, st.lists(st.integers(0, 4), max_size=4)), min_size=2, max_size=2
    ),
    order=st.randoms(use_true_random=False),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "echo": st.booleans(),
            "logprobs": st.integers(0, 2),
            "return_token_ids": st.booleans(),
        },
    ),
)
def test_parts_joined_are_the_whole(samples: list, order: Any, fields: dict) -> None:
    """Whatever the order in which two samples' events come, and whatever is told."""
    queues = [[*pieces(tokens, sizes=sizes), Finished("length", 0)] for tokens, sizes in samples]
    events = []
    while any(queues):
        index = order.choice([i for i, queue in enumerate(queues) if queue])
        events.append((index, queues[index].pop(0)))
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    answer, sent = answer_of(events, prompt="fox", n=2, **fields, **stream)
    assert answer.is_done
    assert all(chunk["usage"] is None for chunk in sent)
    for index, choice in enumerate(answer.whole()["choices"]):
        parts = [c["choices"][0] for c in sent if c["choices"][0]["index"] == index]
        assert choice["index"] == index
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == ["length"]
        assert parts[-1]["finish_reason"] == "length"
        told = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        if choice["logprobs"] is None:
            assert not told
        else:
            for key, values in choice["logprobs"].items():
                assert [value for part in told for value in part[key]] == values
        ids = [token for part in parts for token in part.get("token_ids", [])]
        assert ids == choice.get("token_ids", [])
        if fields.get("return_token_ids"):
            assert ids == samples[index][0]
            assert parts[0]["prompt_token_ids"] == VOCABULARY.tokenizer.encode("fox")
    last = answer.last_chunk()
    assert last is not None
    assert last["choices"] == []
    assert last["usage"] == answer.usage()
    assert last["usage"]["completion_tokens"] == sum(len(tokens) for tokens, _ in samples)


def messages(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_template() -> None:
    request = read_fields(
        ChatRequest,
        {
            "messages": messages(
                ("system", "Be kind."),
                ("user", "Hi."),
                ("assistant", "Hello."),
                ("user", [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]),
            )
        },
    )
    wanted = "Be kind.\n\nUser: Hi.\n\nAssistant: Hello.\n\nUser: Who are you?\n\nAssistant:"
    assert render(request.messages) == wanted


def test_chat_takes_the_rest_of_the_context() -> None:
    plan = plan_of_chat(messages=messages(("user", "Hi.")), stop=["x"])
    (request,) = plan.requests
    assert request.max_tokens == CONTEXT - len(request.prompt)
    assert request.stop == ("x", "\n\nUser:", "\nUser:")
    for name in ("max_tokens", "max_completion_tokens"):
        fields = {"messages": messages(("user", "Hi.")), name: 3}
        assert plan_of_chat(**fields).requests[0].max_tokens == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": messages(("user", "fox " * 200))}, "messages"),
        ({"messages": messages(("tool", "x"))}, "messages[0].role"),
        ({"messages": messages(("user", None))}, "messages[0].content"),
        (
            {"messages": messages(("user", "a"), ("user", [{"type": "image_url"}]))},
            "messages[1].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_completion_tokens": 1000}, "messages"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_chat_is_refused(fields: dict, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        plan_of_chat(**{"messages": messages(("user", "Hi.")), **fields})
    assert (caught.value.status, caught.value.param) == (400, param)


def test_chat_takes_back_its_own_message() -> None:
    said = {"role": "assistant", "content": "Hello.", "refusal": None, "tool_calls": None}
    assert plan_of_chat(messages=[said, *messages(("user", "Hi."))]).requests


def test_no_top_logprobs_need_no_logprobs() -> None:
    plan = plan_of_chat(messages=messages(("user", "Hi.")), logprobs=False, top_logprobs=0)
    assert plan.requests[0].alternatives == 0


@pytest.mark.parametrize(
    ("texts", "content"),
    [
        ([" Hello ", " you."], "Hello  you."),
        (["  Hello"], " Hello"),
        (["", " ", " Hello"], " Hello"),
        (["\nHello"], "\nHello"),
        ([" "], ""),
    ],
)
def test_one_space_is_the_templates(texts: list[str], content: str) -> None:
    request = read_fields(ChatRequest, {"messages": messages(("user", "Hi."))})
    plan = plan_chat(request, VOCABULARY, LIMITS)
    answer = Answer(plan, chat_choices(plan, request, VOCABULARY.tokenizer), FRAME)
    for text in texts:
        answer.take(0, Piece((TokenScore(5, -0.5),), text))
    answer.take(0, Finished("stop", 0))
    assert answer.whole()["choices"][0]["message"]["content"] == content


@given(TOKENS, st.lists(st.integers(0, 4), max_size=4), st.booleans())
def test_chat_parts_joined_are_the_whole(tokens: list, sizes: list, logprobs: bool) -> None:
    fields = {"messages": messages(("user", "Hi.")), "logprobs": logprobs, "stream": True}
    request = read_fields(ChatRequest, fields)
    plan = plan_chat(request, VOCABULARY, LIMITS)
    answer = Answer(plan, chat_choices(plan, request, VOCABULARY.tokenizer), FRAME)
    events = [*pieces(tokens, sizes=sizes), Finished("stop", 0)]
    sent = [c["choices"][0] for event in events for c in answer.take(0, event)]
    (choice,) = answer.whole()["choices"]
    assert sent[0]["delta"]["role"] == "assistant"
    content = "".join(part["delta"].get("content", "") for part in sent)
    text = "".join(event.text for event in events if isinstance(event, Piece))
    assert content == choice["message"]["content"] == text.removeprefix(" ")
    assert [p["finish_reason"] for p in sent] == [None] * (len(sent) - 1) + ["stop"]
    told = [entry for p in sent if p["logprobs"] for entry in p["logprobs"]["content"]]
    if not logprobs:
        assert choice["logprobs"] is None
        assert not told
        return
    assert told == choice["logprobs"]["content"]
    names = [token_name(VOCABULARY.tokenizer, token) for token in tokens]
    assert [entry["token"] for entry in told] == names
    raw = b"".join(bytes(entry["bytes"]) for entry in told)
    assert raw == b"".join(map(VOCABULARY.tokenizer.token_bytes, tokens))
