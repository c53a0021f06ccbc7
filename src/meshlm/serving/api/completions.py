"""`POST /v1/completions`: its fields to a plan, and events to its choices."""

from collections.abc import Sequence
from typing import Any

from meshlm.data.tokenizer import Tokenizer
from meshlm.serving.api.logprobs import CompletionLogprobs
from meshlm.serving.api.plans import Plan, Wanted, make_plan
from meshlm.serving.api.prompts import Prompt, Vocabulary, check_fits, read_prompts
from meshlm.serving.api.protocol import CompletionRequest, check_range, check_sampling
from meshlm.serving.config import Limits
from meshlm.serving.errors import bad_field
from meshlm.serving.requests import Event, PromptScores, TokenScore

DEFAULT_MAX_TOKENS = 16


def plan_completion(request: CompletionRequest, vocabulary: Vocabulary, limits: Limits) -> Plan:
    """Returns what a request asks of the engine.

    Raises:
        ApiError: 400 that names the field.
    """
    check_sampling(request, limits)
    check_range("logprobs", request.logprobs, 0, limits.max_logprobs)
    _check_best_of(request, limits)
    prompts = read_prompts(request.prompt, vocabulary, limits, request.truncate_prompt_tokens)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    for prompt in prompts:
        check_fits("prompt", prompt, max_tokens, vocabulary.context_length)
    wanted = Wanted(
        max_tokens=max_tokens,
        best_of=request.best_of,
        alternatives=request.logprobs or 0,
        score_prompt=bool(request.echo) and request.logprobs is not None,
        tells=request.logprobs is not None,
    )
    return make_plan(request, prompts, wanted, vocabulary, limits)


def _check_best_of(request: CompletionRequest, limits: Limits) -> None:
    best_of, n = request.best_of, request.n or 1
    if best_of is None:
        return
    check_range("best_of", best_of, 1, limits.max_best_of)
    if best_of < n:
        raise bad_field("best_of", f"best_of is {best_of} and n is {n}: give n or more")
    if best_of > 1 and request.stream:
        raise bad_field(
            "best_of",
            f"best_of is {best_of}: which samples are best is known at the end only, so "
            "it cannot be streamed; leave out best_of or stream",
        )


def completion_choices(
    plan: Plan, request: CompletionRequest, tokenizer: Tokenizer
) -> list["CompletionChoice"]:
    """Returns a choice for each of the plan's requests."""
    return [
        CompletionChoice(
            index,
            plan.prompt_of(index),
            CompletionLogprobs(tokenizer) if request.logprobs is not None else None,
            echo=bool(request.echo),
            return_token_ids=plan.return_token_ids,
        )
        for index in range(len(plan.requests))
    ]


class CompletionChoice:
    """One choice of /v1/completions; see `answers.Choice`."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        logprobs: CompletionLogprobs | None,
        *,
        echo: bool,
        return_token_ids: bool,
    ) -> None:
        """Begins a choice; `logprobs` is None where they are not asked for."""
        self._index = index
        self._prompt = prompt
        self._logprobs = logprobs
        self._echo = echo
        self._return_token_ids = return_token_ids
        self._whole = self._part("")
        if logprobs is not None:
            self._whole["logprobs"] = logprobs.output(())

    def begin(self, event: Event) -> dict[str, Any] | None:
        """Returns the part of the prompt, where it is echoed or its ids are wanted."""
        if not self._echo and not self._return_token_ids:
            return None
        part = self._part(self._prompt.text if self._echo else "")
        if self._echo and self._logprobs is not None:
            scores = event.scores if isinstance(event, PromptScores) else ()
            part["logprobs"] = self._logprobs.prompt(self._prompt.tokens, self._prompt.text, scores)
        if self._return_token_ids:
            part["prompt_token_ids"] = list(self._prompt.tokens)
        return self._add(part)

    def piece(self, tokens: Sequence[TokenScore], text: str) -> dict[str, Any] | None:
        """Returns the part of new tokens; without details one that has text."""
        part = self._part(text)
        if self._logprobs is not None:
            part["logprobs"] = self._logprobs.output(tokens)
        if self._return_token_ids:
            part["token_ids"] = [score.token for score in tokens]
        has_details = self._logprobs is not None or self._return_token_ids
        return self._add(part) if text or (has_details and tokens) else None

    def end(self, reason: str) -> dict[str, Any]:
        """Returns the part that says why."""
        return self._add(self._part("") | {"finish_reason": reason})

    def whole(self) -> dict[str, Any]:
        """Returns the choice."""
        return self._whole

    def _part(self, text: str) -> dict[str, Any]:
        part = {"index": self._index, "text": text, "logprobs": None, "finish_reason": None}
        return part | {"token_ids": []} if self._return_token_ids else part

    def _add(self, part: dict[str, Any]) -> dict[str, Any]:
        """Returns the part, after joining it to the whole."""
        whole = self._whole
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        if part["logprobs"] is not None:
            for key, values in part["logprobs"].items():
                whole["logprobs"][key] += values
        if self._return_token_ids:
            whole["token_ids"] += part["token_ids"]
            if "prompt_token_ids" in part:
                whole["prompt_token_ids"] = part["prompt_token_ids"]
        return part
