"""What is asked of the engine, and what it answers. Knows neither JAX nor HTTP.

A `Request` is one sample that somebody waits for. Its answers are events, in this order: at most
one `PromptScores`, any number of `Piece`s, and exactly one `Finished` or `Failed`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

from meshlm.core.errors import MeshLMError
from meshlm.generation.config import FinishReason

FailureKind = Literal["cancelled", "deadline", "draining", "engine"]
State = Literal["loading", "ready", "draining", "stopped", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sample of one prompt, checked already: the engine refuses nothing in it."""

    prompt: tuple[int, ...]
    """Token ids, at least one; with `max_tokens` they fit the context."""
    max_tokens: int = 16
    """The most tokens to generate; 0 only scores the prompt."""
    temperature: float = 1.0
    """0 always takes the most probable token."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits once for each time that the output has the token."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these ids; -100 or less forbids a token."""
    seed: int = 0
    """-2**63 to 2**63 - 1. Random numbers depend on it, on the two indices and on the position."""
    prompt_index: int = 0
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the sample; they are not part of it."""
    ignore_end_of_text: bool = False
    """Go on after any of the tokens that end a sample."""
    alternatives: int = 0
    """How many of the most probable tokens are told with each token."""
    score_prompt: bool = False
    """Tell the log-probabilities of the prompt's tokens first."""
    deadline_s: float | None = None
    """On time.monotonic's clock; later the request fails, whether it runs or waits."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenScore:
    """A token and how probable it was, under the model's own distribution (natural logarithms)."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable ids and their log-probabilities, most probable first."""

    @property
    def is_finite(self) -> bool:
        """Whether none of the numbers is NaN or infinite."""
        return all(
            math.isfinite(log_prob) for log_prob in (self.log_prob, *dict(self.top).values())
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PromptScores:
    """The prompt's tokens from the second on, each given those before it."""

    scores: tuple[TokenScore, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that were chosen, and the text that they made certain (which may be of earlier ones).

    A token that ends the sample is told too; its text is not.
    """

    tokens: tuple[TokenScore, ...]
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The sample is whole."""

    reason: FinishReason
    cached_tokens: int
    """Tokens of the prompt that were computed for an earlier request."""
    queued_s: float = dataclasses.field(default=0.0, compare=False)
    """How long it waited before its prompt began."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The sample ends here, for a reason of the server's."""

    kind: FailureKind
    message: str


Event = PromptScores | Piece | Finished | Failed
OnEvent = Callable[[int, Event], None]
"""Called with a request's index in its submission, on the engine's thread: it only hands over."""


class QueueFullError(MeshLMError):
    """The queue has no room; try again later."""


class NotReadyError(MeshLMError):
    """The engine takes no requests in its present state."""

    def __init__(self, state: State, message: str) -> None:
        super().__init__(message)
        self.state: State = state
