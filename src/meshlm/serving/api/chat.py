"""`POST /v1/chat/completions`: messages as plain text, for a model that was not trained to chat.

    {system}

    User: {message}

    Assistant: {answer}

    User: {message}

    Assistant:

The answer ends where the model begins the user's next message.
"""

from collections.abc import Sequence
from typing import Any

from meshlm.data.tokenizer import Tokenizer
from meshlm.serving.api.logprobs import chat_logprobs
from meshlm.serving.api.plans import Plan, Wanted, make_plan
from meshlm.serving.api.prompts import Prompt, Vocabulary, check_fits, encode_text
from meshlm.serving.api.protocol import ChatMessage, ChatRequest, check_range, check_sampling
from meshlm.serving.config import Limits
from meshlm.serving.errors import bad_field
from meshlm.serving.requests import Event, TokenScore

_ROLES = {"user": "User: ", "assistant": "Assistant: "}
_ANSWER = "Assistant:"
# The user's next message begins so.
_STOP = ("\n\nUser:", "\nUser:")


def render(messages: Sequence[ChatMessage]) -> str:
    """Returns the prompt that asks for the assistant's next message."""
    parts = [_ROLES.get(message.role, "") + text_of(message) for message in messages]
    return "\n\n".join([*parts, _ANSWER])


def text_of(message: ChatMessage) -> str:
    """Returns the text of a message, its parts joined."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def plan_chat(request: ChatRequest, vocabulary: Vocabulary, limits: Limits) -> Plan:
    """Returns what a request asks of the engine.

    Raises:
        ApiError: 400 that names the field.
    """
    check_sampling(request, limits)
    check_range("top_logprobs", request.top_logprobs, 0, limits.max_logprobs)
    check_range("max_completion_tokens", request.max_completion_tokens, 0, None)
    if request.top_logprobs and not request.logprobs:
        raise bad_field("top_logprobs", "top_logprobs is for logprobs: true only")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise bad_field("max_tokens", "max_tokens and max_completion_tokens are one: give one")
    if not request.messages:
        raise bad_field("messages", "messages is an empty list: give at least one message")
    text = render(request.messages)
    # What a user writes never becomes a special token, and the template spells none.
    tokens = encode_text("messages", text, vocabulary, "text")
    keep = request.truncate_prompt_tokens
    prompt = Prompt(tokens=tuple(tokens if keep is None else tokens[-keep:]), text=text)
    given = [m for m in (request.max_tokens, request.max_completion_tokens) if m is not None]
    room = vocabulary.context_length - len(prompt.tokens)
    max_tokens = given[0] if given else max(1, room)
    check_fits("messages", prompt, max_tokens, vocabulary.context_length)
    wanted = Wanted(
        max_tokens=max_tokens,
        alternatives=request.top_logprobs or 0,
        stop=_STOP,
        tells=bool(request.logprobs),
    )
    return make_plan(request, [prompt], wanted, vocabulary, limits)


def chat_choices(plan: Plan, request: ChatRequest, tokenizer: Tokenizer) -> list["ChatChoice"]:
    """Returns a choice for each of the plan's requests."""
    return [
        ChatChoice(
            index,
            plan.prompt_of(index),
            tokenizer if request.logprobs else None,
            return_token_ids=plan.return_token_ids,
        )
        for index in range(len(plan.requests))
    ]


class ChatChoice:
    """One choice of /v1/chat/completions; see `answers.Choice`."""

    def __init__(
        self, index: int, prompt: Prompt, logprobs: Tokenizer | None, *, return_token_ids: bool
    ) -> None:
        """Begins a choice; `logprobs` is None where they are not asked for."""
        self._index = index
        self._prompt = prompt
        self._logprobs = logprobs
        self._return_token_ids = return_token_ids
        self._text = ""
        self._scores: list[TokenScore] = []
        self._reason: str | None = None
        self._at_start = True

    def begin(self, event: Event) -> dict[str, Any] | None:
        """Returns the part that says who speaks."""
        part = self._part({"role": "assistant", "content": ""}, ())
        if self._return_token_ids:
            part["prompt_token_ids"] = list(self._prompt.tokens)
        return part

    def piece(self, tokens: Sequence[TokenScore], text: str) -> dict[str, Any] | None:
        """Returns the part of new tokens; without details one that has text."""
        if self._at_start and text:
            # The template's own space, which the model writes.
            text, self._at_start = text.removeprefix(" "), False
        self._text += text
        self._scores += tokens
        has_details = self._logprobs is not None or self._return_token_ids
        if not text and not (has_details and tokens):
            return None
        return self._part({"content": text}, tokens)

    def end(self, reason: str) -> dict[str, Any]:
        """Returns the part that says why."""
        self._reason = reason
        return self._part({}, ()) | {"finish_reason": reason}

    def whole(self) -> dict[str, Any]:
        """Returns the choice."""
        choice = {
            "index": self._index,
            "message": {"role": "assistant", "content": self._text, "refusal": None},
            "logprobs": self._told(self._scores),
            "finish_reason": self._reason,
        }
        if self._return_token_ids:
            choice["token_ids"] = [score.token for score in self._scores]
            choice["prompt_token_ids"] = list(self._prompt.tokens)
        return choice

    def _part(self, delta: dict[str, Any], tokens: Sequence[TokenScore]) -> dict[str, Any]:
        part = {
            "index": self._index,
            "delta": delta,
            "logprobs": self._told(tokens) if tokens else None,
            "finish_reason": None,
        }
        if self._return_token_ids:
            part["token_ids"] = [score.token for score in tokens]
        return part

    def _told(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        return {"content": chat_logprobs(self._logprobs, scores), "refusal": None}
