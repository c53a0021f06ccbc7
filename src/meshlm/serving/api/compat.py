"""Two older APIs of GPT-J: that of the original's server, and that of its public web demo.

`POST /complete` was `device_serve.py`'s, `POST /completion` that of the page's server. Clients of
the second spell its fields in several ways, give numbers as texts, and take 503 for "try later".
"""

import re
from collections.abc import Mapping
from typing import Any

from meshlm.serving.api.answers import Answer, Frame
from meshlm.serving.api.completions import completion_choices
from meshlm.serving.api.plans import Plan, Wanted, make_plan
from meshlm.serving.api.prompts import Vocabulary, check_fits, read_prompts
from meshlm.serving.api.protocol import CompletionRequest, check_sampling, read_fields, shorten
from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError, bad_field, error_headers

COMPLETE_TOKENS = 256
"""The original's server generated as many, always."""
DEMO_TOKENS = 128
_TOP_P = 0.9
_TEMPERATURE = 0.8
_FRAME = Frame(id="", created=0, model="", fingerprint="", kind="", chunk_kind="")

_SPELLINGS = {"temperature": "temp"}
_CAPITAL = re.compile(r"(?<=[a-z])([A-Z])")


def plan_complete(data: Mapping[str, Any], vocabulary: Vocabulary, limits: Limits) -> Plan:
    """Returns what `POST /complete` asks of the engine: 256 tokens, or as many as have room.

    Raises:
        ApiError: 400 that names the field.
    """
    fields = _known(data, ("context", "top_p", "temp"))
    return _plan(fields, None, COMPLETE_TOKENS, vocabulary, limits)


def plan_demo(data: Mapping[str, Any], vocabulary: Vocabulary, limits: Limits) -> tuple[Plan, bool]:
    """Returns what `POST /completion` asks of the engine, and whether its answer has the prompt.

    Without `response_length` it is 128 tokens, or as many as have room.

    Raises:
        ApiError: 400 that names the field.
    """
    plain = {_plain(key): value for key, value in data.items()}
    if len(plain) < len(data):
        twice = next(name for name in plain if sum(_plain(key) == name for key in data) > 1)
        raise bad_field(twice, f"{twice} is given in two spellings: give it once")
    fields = _known(
        plain,
        ("context", "top_p", "temp", "response_length", "remove_input"),
    )
    length = fields.pop("response_length", None)
    if length is not None:
        length = _whole_number("response_length", length)
    has_prompt = not _flag("remove_input", fields.pop("remove_input", False))
    if not fields.get("context"):
        raise bad_field("context", "context is missing: give the text to go on from")
    return _plan(fields, length, DEMO_TOKENS, vocabulary, limits), has_prompt


def answer_to(plan: Plan, vocabulary: Vocabulary) -> Answer:
    """Returns the answer whose only choice has the text."""
    choices = completion_choices(plan, CompletionRequest(), vocabulary.tokenizer)
    return Answer(plan, choices, _FRAME)


def demo_error(error: ApiError) -> ApiError:
    """Returns an error as the demo's clients know it."""
    code, status, headers = "API_ERROR", error.status, error.headers
    if error.status == 429:
        code, status, headers = "RATE_LIMITED", 503, error_headers(503, retry_after_s=1)
    elif error.param == "context" and error.code is None:
        code = "NO_PROMPT"
    return ApiError(
        status, str(error), code=code, param=error.param, headers=headers, reason=error.reason
    )


def _plan(
    fields: Mapping[str, Any],
    max_tokens: int | None,
    default: int,
    vocabulary: Vocabulary,
    limits: Limits,
) -> Plan:
    context = fields.get("context")
    if not isinstance(context, str):
        raise bad_field("context", f"context is {shorten(context)}: give a text")
    request = read_fields(
        CompletionRequest,
        {
            "top_p": _number("top_p", fields.get("top_p", _TOP_P)),
            "temperature": _number("temp", fields.get("temp", _TEMPERATURE)),
        },
    )
    check_sampling(request, limits)
    prompt = read_prompts(context, vocabulary, limits)[0]
    if max_tokens is None:
        room = vocabulary.context_length - len(prompt.tokens)
        max_tokens = max(1, min(default, room))
    check_fits("context", prompt, max_tokens, vocabulary.context_length, "shorten the context")
    return make_plan(request, [prompt], Wanted(max_tokens=max_tokens), vocabulary, limits)


def _known(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    given = {name: value for name, value in data.items() if value is not None}
    for name in given:
        if name not in names:
            raise bad_field(name[:200], f"{name[:200]} is not supported here: leave it out")
    return given


def _plain(name: str) -> str:
    """Returns a field's name in one spelling: top_p for topP and top-p."""
    plain = _CAPITAL.sub(r"_\1", name).lower().replace("-", "_")
    return _SPELLINGS.get(plain, plain)


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    try:
        if is_number and abs(number := float(value)) < 1e15:
            return number
    except (ValueError, OverflowError):
        pass
    raise bad_field(name, f"{name} is {shorten(value)}: give a number")


def _whole_number(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number) or number < 0:
        raise bad_field(name, f"{name} is {shorten(value)}: give a whole number, 0 or more")
    return int(number)


def _flag(name: str, value: Any) -> bool:
    text = str(value).lower()[:8]
    if isinstance(value, bool | int | str) and text in ("true", "1", "false", "0", ""):
        return text in ("true", "1")
    raise bad_field(name, f"{name} is {shorten(value)}: give true or false")
