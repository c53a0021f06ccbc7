"""From the engine's events to an answer: pure, and one way for streamed and whole answers.

Each event makes at most one part of a choice. A stream sends the parts; a whole answer joins them,
so both say the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from meshlm.serving.api.plans import Plan
from meshlm.serving.requests import Event, Failed, Finished, Piece, TokenScore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around the choices."""

    id: str
    created: int
    model: str
    fingerprint: str
    kind: str
    """What `object` says of a whole answer."""
    chunk_kind: str
    """What it says of a part of a stream."""

    def around(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """Returns the object with these choices."""
        return {
            "id": self.id,
            "object": self.chunk_kind if chunk else self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class Choice(Protocol):
    """Writes one choice in the form of one of the APIs."""

    def begin(self, event: Event) -> dict[str, Any] | None:
        """Returns the part that comes before all others, given the first event."""

    def piece(self, tokens: Sequence[TokenScore], text: str) -> dict[str, Any] | None:
        """Returns the part of new tokens, None where nothing is to be shown yet."""

    def end(self, reason: str) -> dict[str, Any]:
        """Returns the last part."""
        ...

    def whole(self) -> dict[str, Any]:
        """Returns all parts so far as one."""
        ...


class Sample:
    """One sample while its events come."""

    def __init__(self, choice: Choice) -> None:
        """Nothing has come yet."""
        self.choice = choice
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._log_prob = 0.0
        self._has_begun = False

    @property
    def mean_log_prob(self) -> float:
        """The mean of its tokens' log-probabilities; one without tokens comes last."""
        return self._log_prob / self.num_tokens if self.num_tokens else float("-inf")

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Returns the parts that an event makes."""
        parts = []
        if not self._has_begun:
            self._has_begun = True
            parts.append(self.choice.begin(event))
        if isinstance(event, Piece):
            self.num_tokens += len(event.tokens)
            self._log_prob += sum(score.log_prob for score in event.tokens)
            parts.append(self.choice.piece(event.tokens, event.text))
        elif isinstance(event, Finished):
            self.cached_tokens = event.cached_tokens
            self.finish_reason = event.reason
            parts.append(self.choice.end(event.reason))
        return [part for part in parts if part is not None]


class Answer:
    """The answer to one API request while its events come. None of them may be a `Failed`."""

    def __init__(self, plan: Plan, choices: Sequence[Choice], frame: Frame) -> None:
        """Begins with a choice for each of the plan's requests."""
        self.plan = plan
        self._frame = frame
        self._samples = [Sample(choice) for choice in choices]

    @property
    def is_done(self) -> bool:
        """Whether every sample is whole."""
        return all(sample.finish_reason for sample in self._samples)

    @property
    def finish_reason(self) -> str:
        """How the first sample ended."""
        return self._samples[0].finish_reason or "length"

    def take(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Returns the parts of a stream that an event makes."""
        assert not isinstance(event, Failed)
        return [self._chunk([part]) for part in self._samples[index].take(event)]

    def last_chunk(self) -> dict[str, Any] | None:
        """Returns what ends a stream, if usage is asked for."""
        if not self.plan.include_usage:
            return None
        return self._chunk([]) | {"usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """Returns the whole answer, once it is done."""
        return self._frame.around(self.choices(), chunk=False) | {"usage": self.usage()}

    def choices(self) -> list[dict[str, Any]]:
        """Returns the choices that are given back, prompt by prompt."""
        chosen = []
        for start in range(0, len(self._samples), self.plan.best_of):
            group = self._samples[start : start + self.plan.best_of]
            if self.plan.is_ranked:
                group = sorted(group, key=lambda sample: -sample.mean_log_prob)
            chosen += [sample.choice.whole() for sample in group[: self.plan.n]]
        return [choice | {"index": index} for index, choice in enumerate(chosen)]

    def usage(self) -> dict[str, Any]:
        """Returns the counts: a prompt once, every generated token, the discarded ones too."""
        prompt = sum(len(prompt.tokens) for prompt in self.plan.prompts)
        completion = sum(sample.num_tokens for sample in self._samples)
        # Later samples of a prompt find it computed by the first.
        cached = sum(sample.cached_tokens for sample in self._samples[:: self.plan.best_of])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._frame.around(choices, chunk=True)
        return chunk | {"usage": None} if self.plan.include_usage else chunk
