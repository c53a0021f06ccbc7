"""The requests of the API: every field that is honoured, strictly typed, every bound stated.

Another field is refused by name, unless it is null or has a neutral value (`neutral.py`): nothing
that would change the answer is ignored. The fields in `UNUSED` are taken and not used.
"""

import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from meshlm.generation.config import MAX_SEED, MIN_SEED
from meshlm.serving.api.neutral import (
    MESSAGE_NEUTRAL,
    REQUEST_NEUTRAL,
    STREAM_OPTIONS_NEUTRAL,
    TEXT_PART_NEUTRAL,
    Neutral,
    is_neutral,
)
from meshlm.serving.config import Limits
from meshlm.serving.errors import ApiError, bad_field

_TEXTS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        _TEXTS | {"minItems": 1},
        _IDS | {"minItems": 1},
        {"type": "array", "items": _IDS, "minItems": 1},
        {"type": "null"},
    ]
}
_STOP = {"anyOf": [{"type": "string"}, _TEXTS, {"type": "null"}]}

# Looked at by prompts.py, whose messages say more than those of a union of types.
PromptField = Annotated[Any, WithJsonSchema(_PROMPT)]
StopField = Annotated[Any, WithJsonSchema(_STOP)]


class Strict(BaseModel):
    """A model that neither converts a value nor lets an unknown field pass, unless it is null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}
    """Fields beside the model's own, and the values at which they are taken as left out."""

    @classmethod
    def is_left_out(cls, name: str, value: Any) -> bool:
        """Returns whether a field that is not the model's own asks for nothing."""
        return name not in cls.model_fields and is_neutral(value, cls.neutral.get(name, ()))

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not cls.is_left_out(name, value)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """Returns the schema with the neutral values too."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, values in cls.neutral.items():
            schema["properties"][name] = {
                "enum": [*values, None],
                "description": "Not honoured: taken as left out at these values.",
            }
        return schema


class StreamOptions(Strict):
    """How a stream is given."""

    neutral: ClassVar[Neutral] = STREAM_OPTIONS_NEUTRAL
    include_usage: bool | None = None


class SamplingFields(Strict):
    """What completions and chat have in common. null stands for a field that is left out."""

    neutral: ClassVar[Neutral] = REQUEST_NEUTRAL
    model: str | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    metadata: dict[str, Any] | None = None
    min_p: float | None = None
    n: int | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None
    repetition_penalty: float | None = None
    return_token_ids: bool | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    stop: StopField = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    neutral: ClassVar[Neutral] = REQUEST_NEUTRAL | {"top_logprobs": (0,)}
    prompt: PromptField = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class TextPart(Strict):
    """A part of a message."""

    neutral: ClassVar[Neutral] = TEXT_PART_NEUTRAL
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message. The empty fields of an answer that a client sends back are taken."""

    neutral: ClassVar[Neutral] = MESSAGE_NEUTRAL
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _say_nothing(cls, data: Any) -> Any:
        """An answer without content, which a client may send back, is an empty text."""
        is_answer = isinstance(data, dict) and data.get("role") == "assistant"
        return data | {"content": ""} if is_answer and data.get("content") is None else data


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar[Neutral] = REQUEST_NEUTRAL | {"best_of": (1,), "echo": (False,)}
    messages: Annotated[list[ChatMessage], FailFast()]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    top_logprobs: int | None = None


UNUSED = {
    SamplingFields: ("user", "metadata", "safety_identifier", "prompt_cache_key"),
    ChatMessage: ("id", "name"),
}


class TokenizeRequest(Strict):
    """`POST /tokenize`: one of `prompt` and `text`."""

    prompt: str | None = None
    text: str | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    tokens: Annotated[list[int], FailFast()]
    model: str | None = None


AnyRequest = TypeVar("AnyRequest", bound=Strict)


def read_fields(kind: type[AnyRequest], data: Mapping[str, Any]) -> AnyRequest:
    """Returns the request that `data` describes.

    Raises:
        ApiError: 400 that names the first field that is unknown, missing or of another type.
    """
    for name, value in data.items():
        if name not in kind.model_fields and not kind.is_left_out(name, value):
            raise _unsupported(name, kind.neutral)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from None


def check_sampling(request: SamplingFields, limits: Limits) -> None:
    """Raises the 400 that names the field where a value is out of its bounds."""
    check_range("n", request.n, 1, limits.max_n)
    check_range("temperature", request.temperature, 0, 2)
    check_range("min_p", request.min_p, 0, 1)
    check_range("repetition_penalty", request.repetition_penalty, 0.01, 100)
    check_range("presence_penalty", request.presence_penalty, -2, 2)
    check_range("frequency_penalty", request.frequency_penalty, -2, 2)
    check_range("seed", request.seed, MIN_SEED, MAX_SEED)
    check_range("max_tokens", request.max_tokens, 0, None)
    check_range("top_k", request.top_k, -1, None)
    check_range("truncate_prompt_tokens", request.truncate_prompt_tokens, 1, None)
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise bad_field("top_p", f"top_p is {request.top_p!r}: give a number above 0 and at most 1")
    options = request.stream_options
    if options is not None and options.include_usage and not request.stream:
        raise bad_field("stream_options", "stream_options is for stream: true only")


def check_range(name: str, value: float | None, least: float, most: float | None) -> None:
    """Raises the 400 that names field, value and limits where the value is outside of them."""
    if value is None or (value >= least and (most is None or value <= most)):
        return
    bounds = f"{least} or more" if most is None else f"a number from {least} to {most}"
    raise bad_field(name, f"{name} is {shorten(value)}: give {bounds}")


def read_stop(value: Any, limits: Limits) -> tuple[str, ...]:
    """Returns the stop texts; raises the 400 where they are none, or too many, or too long."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list):
        raise bad_field("stop", f"stop is {shorten(value)}: give a text, or a list of texts")
    if len(texts) > limits.max_stop:
        raise bad_field("stop", f"stop has {len(texts)} texts: give at most {limits.max_stop}")
    for place, text in enumerate(texts):
        name = f"stop[{place}]" if texts is value else "stop"
        if not isinstance(text, str) or not text:
            raise bad_field(name, f"{name} is {shorten(text)}: give a text of some length")
        if len(text) > limits.max_stop_chars:
            raise bad_field(
                name, f"{name} has {len(text)} characters: give at most {limits.max_stop_chars}"
            )
    return tuple(texts)


def read_logit_bias(
    value: Mapping[str, float] | None, vocab_size: int, limits: Limits
) -> dict[int, float]:
    """Returns the bias of each id; raises the 400 where a key is no id or a value out of bounds."""
    if not value:
        return {}
    if len(value) > limits.max_logit_bias:
        message = f"logit_bias has {len(value)} entries: give at most {limits.max_logit_bias}"
        raise bad_field("logit_bias", message)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        name = f"logit_bias[{shorten(key)}]"
        is_id = key.isascii() and key.isdecimal() and len(key) <= 9 and int(key) < vocab_size
        if not is_id or int(key) in biases:
            raise bad_field(
                "logit_bias",
                f"{name}: its key is no token id of 0 to {vocab_size - 1}, written once",
            )
        check_range(name, bias, -100, 100)
        biases[int(key)] = bias
    return biases


def shorten(value: Any) -> str:
    """Returns a value as a message shows it: never long, and in one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = _SHORT.repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _explain(error: ValidationError) -> ApiError:
    """Returns the 400 for the first of the errors."""
    errors = error.errors(include_url=False, include_context=False)
    # Of a union's errors the one that looked furthest into the value says most.
    field = errors[0]["loc"][0]
    first = max((e for e in errors if e["loc"][0] == field), key=lambda e: len(e["loc"]))
    loc = [at for at in first["loc"] if at not in ("str", _PARTS)]
    name = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in loc)[1:]
    if first["type"] == "missing":
        return bad_field(name, f"{name} is missing")
    if first["type"] == "extra_forbidden":
        return _unsupported(name, _NESTED)
    wanted = first["msg"][:1].lower() + first["msg"][1:].split(" or instance")[0]
    return bad_field(name[:200], f"{name[:200]} is {shorten(first['input'])}: {wanted}")


def _unsupported(name: str, known: Neutral) -> ApiError:
    """Returns the 400 for a field that is not honoured; `known` has the neutral values of some."""
    values = known.get(name.rpartition(".")[2], ())
    or_give = f", or give {json.dumps(values[0])}" if values else ""
    return bad_field(name[:200], f"{name[:200]} is not supported here: leave it out{or_give}")


# Of fields inside of others.
_NESTED = {**MESSAGE_NEUTRAL, **TEXT_PART_NEUTRAL, **STREAM_OPTIONS_NEUTRAL}
# How pydantic names the second kind of a message's content.
_PARTS = "list[TextPart]"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
