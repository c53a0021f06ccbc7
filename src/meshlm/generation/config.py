"""What a caller asks of generation, and what is given back."""

import dataclasses
import math
import operator
from typing import Literal

from meshlm.core.errors import UsageError

MAX_ALTERNATIVES = 20
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, and when to stop. The order is that of `sampling.py`."""

    max_tokens: int = 64
    """The most tokens to generate for each sample."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int | None = None
    """Sample among the K most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest most probable tokens whose probabilities reach P together."""
    min_p: float | None = None
    """Sample among tokens at least P times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens of the prompt and of the output so far less probable."""
    seed: int = 0
    """The same seed gives the same text; any 64-bit integer, -2**63 to 2**63 - 1."""
    n: int = 1
    """Samples for each prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are not part of it."""
    ignore_end_of_text: bool = False
    """Go on after any of the tokens that end a sample."""
    logprobs: int | None = None
    """Also give the log-probabilities of this many of the most probable tokens at each place."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check("max_tokens", self.max_tokens >= 1, "give 1 or more")
        self._check(
            "temperature",
            self.temperature >= 0 and math.isfinite(self.temperature),
            "give a number from 0 (always the most probable token) up",
        )
        self._check(
            "top_k", self.top_k is None or self.top_k >= 1, "give 1 or more, or leave it out"
        )
        self._check(
            "top_p",
            self.top_p is None or 0 < self.top_p <= 1,
            "give a number above 0 and at most 1",
        )
        self._check(
            "min_p", self.min_p is None or 0 <= self.min_p <= 1, "give a number from 0 to 1"
        )
        self._check(
            "repetition_penalty",
            self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
            "give a number above 0 (1 means none)",
        )
        self._check(
            "seed",
            MIN_SEED <= self.seed <= MAX_SEED,
            f"give a whole number from {MIN_SEED} to {MAX_SEED}",
        )
        self._check("n", self.n >= 1, "give 1 or more")
        self._check("stop", all(self.stop), "give texts of at least one character")
        self._check(
            "logprobs",
            self.logprobs is None or 0 <= self.logprobs <= MAX_ALTERNATIVES,
            f"give a number from 0 to {MAX_ALTERNATIVES}",
        )

    def _check(self, name: str, good: bool, remedy: str) -> None:
        if not good:
            option = name if name == "n" else name.replace("_", "-")
            dashes = "-" if name == "n" else "--"
            raise UsageError(f"{dashes}{option} is {getattr(self, name)!r}: {remedy}")


def split_seed(seed: int) -> tuple[int, int]:
    """Returns the low and the high 32 bits of a seed; a negative one is in two's complement."""
    # A Python integer: numpy's have a width, beyond which they cannot be shifted.
    whole = operator.index(seed)
    return whole & 0xFFFFFFFF, whole >> 32 & 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One sample."""

    text: str
    """The text of the new tokens, without one that ends it, and cut before a stop text."""
    tokens: list[int]
    """Every token that was sampled, the one that ended the sample included."""
    logprobs: list[float]
    """The natural log-probability of each token under the model's own distribution."""
    top_logprobs: list[dict[int, float]] | None
    """For each token the most probable ids and their log-probabilities, if asked for."""
    finish_reason: FinishReason
    """`stop`: end-of-text or a stop text; `length`: max_tokens or the end of the context."""
