"""From the fields of an API request to the requests that the engine gets."""

import dataclasses
import secrets
import time
from collections.abc import Sequence

from meshlm.serving.api.prompts import Prompt, Vocabulary
from meshlm.serving.api.protocol import SamplingFields, read_logit_bias, read_stop
from meshlm.serving.config import Limits
from meshlm.serving.errors import bad_field
from meshlm.serving.requests import Request

# The most probable token always reaches it, for no vocabulary has so many tokens. A float32 that is
# smaller still would be 0.
_LEAST_TOP_P = 1e-7


# Log-probabilities of one request: each takes some hundred bytes until the answer is sent.
MAX_TOLD = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one API request asks for."""

    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    """`best_of` for each prompt, those of the first prompt first."""
    n: int
    """How many of these are given back."""
    best_of: int
    is_ranked: bool
    """Those with the highest mean log-probability are given back, best first."""
    stream: bool
    include_usage: bool
    return_token_ids: bool

    def prompt_of(self, index: int) -> Prompt:
        """Returns the prompt of a request, given its index."""
        return self.prompts[index // self.best_of]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What depends on which API is asked."""

    max_tokens: int
    best_of: int | None = None
    alternatives: int = 0
    score_prompt: bool = False
    stop: tuple[str, ...] = ()
    """More stop texts than the request's own."""
    tells: bool = False
    """Whether tokens' log-probabilities are told."""


def make_plan(
    fields: SamplingFields,
    prompts: Sequence[Prompt],
    wanted: Wanted,
    vocabulary: Vocabulary,
    limits: Limits,
) -> Plan:
    """Returns the plan of fields whose bounds are checked already.

    Raises:
        ApiError: 400, for too many samples or log-probabilities, or a stop text or a bias that is
            none.
    """
    n = 1 if fields.n is None else fields.n
    best_of = n if wanted.best_of is None else wanted.best_of
    count = len(prompts) * best_of
    if count > limits.max_samples:
        raise bad_field(
            "n" if wanted.best_of is None else "best_of",
            f"{len(prompts)} prompts times {best_of} samples are {count}: this server makes at "
            f"most {limits.max_samples} for one request",
        )
    if wanted.tells:
        _check_told(prompts, best_of, wanted)
    shared = _shared_options(fields, wanted, vocabulary, limits)
    return Plan(
        prompts=tuple(prompts),
        requests=tuple(
            dataclasses.replace(
                shared, prompt=prompt.tokens, prompt_index=index, sample_index=sample
            )
            for index, prompt in enumerate(prompts)
            for sample in range(best_of)
        ),
        n=n,
        best_of=best_of,
        is_ranked=wanted.best_of is not None and best_of > 1,
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        return_token_ids=bool(fields.return_token_ids),
    )


def _check_told(prompts: Sequence[Prompt], best_of: int, wanted: Wanted) -> None:
    scored = sum(len(prompt.tokens) for prompt in prompts) if wanted.score_prompt else 0
    tokens = best_of * (scored + len(prompts) * wanted.max_tokens)
    if tokens * (1 + wanted.alternatives) > MAX_TOLD:
        raise bad_field(
            "logprobs",
            f"logprobs asks for {wanted.alternatives} alternatives of up to {tokens} tokens: ask "
            f"for less than {MAX_TOLD} of both together, with fewer of prompts, samples, tokens "
            "or alternatives",
        )


def _shared_options(
    fields: SamplingFields, wanted: Wanted, vocabulary: Vocabulary, limits: Limits
) -> Request:
    top_k = fields.top_k if fields.top_k is not None and fields.top_k > 0 else None
    top_p = fields.top_p if fields.top_p is not None and fields.top_p < 1 else None
    return Request(
        prompt=(),
        max_tokens=wanted.max_tokens,
        temperature=_or(fields.temperature, 1.0),
        top_k=None if top_k is None else min(top_k, vocabulary.size),
        top_p=None if top_p is None else max(top_p, _LEAST_TOP_P),
        min_p=fields.min_p,
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        logit_bias=read_logit_bias(fields.logit_bias, vocabulary.size, limits),
        seed=secrets.randbits(32) if fields.seed is None else fields.seed,
        stop=(*read_stop(fields.stop, limits), *wanted.stop),
        ignore_end_of_text=bool(fields.ignore_eos),
        alternatives=wanted.alternatives,
        score_prompt=wanted.score_prompt,
        deadline_s=time.monotonic() + limits.request_timeout_s,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
