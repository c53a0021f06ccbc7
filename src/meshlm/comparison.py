"""How far two checkpoints, or two ways to compute one, are apart.

Dim letters: B batch, T time, V vocabulary rows.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from meshlm.api import Model, load
from meshlm.conversion.mtj.source import is_mtj
from meshlm.conversion.proof.certificate import spread_tokens
from meshlm.core.errors import BadInputError, UsageError
from meshlm.generation.profiles import Dtype, Profile

# Prose, code, figures and other scripts: what a model meets.
SAMPLE_TEXT = '''\
Mesh networks pass a message along from neighbour to neighbour, until it reaches the one who asked.
In 1850 a letter took twelve days across the ocean; by 1866 a cable did it in minutes.

def is_even(number: int) -> bool:
    """True for 0, 2, 4 and so on."""
    return number % 2 == 0

Q: What is the capital of France?
A: Paris. (Пари́ж, パリ, باريس)
The sum of 17.25 and 3.5 is 20.75; a third of that is 6.91666...
'''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models."""

    path: Path
    profile: Profile = "fast"
    dtype: Dtype | None = None
    config: str | None = None
    """Of the original's weights alone."""
    allow_pickle: bool = False
    verify: bool = False

    def load(self) -> Model:
        """Returns the model."""
        return load(
            self.path,
            profile=self.profile,
            dtype=self.dtype,
            config=self.config if is_mtj(self.path) else None,
            allow_pickle=self.allow_pickle,
            verify=self.verify,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far the logits of two models are apart, on the same tokens."""

    tokens: int
    max_difference: float
    """Of a logit."""
    mean_difference: float
    largest_logit: float
    """The largest |logit| of the first model: what the differences are small against."""
    kl: float
    """Mean of KL(first || second) over the positions, in nats."""
    top1_agreement: float
    """Share of the positions at which both find the same token most probable."""

    @property
    def relative_difference(self) -> float:
        """The largest difference over the largest |logit|."""
        return self.max_difference / (self.largest_logit or 1.0)


def compare(one: Side, other: Side, text: str | None = None, length: int = 256) -> Distance:
    """Returns the distance of two models, which are loaded one after the other.

    Args:
        text: what they read; a text that comes with this module unless given. A model without a
            tokenizer reads ids that follow a fixed rule.
        length: the most tokens that they read, from the start.

    Raises:
        UsageError: the models have no vocabulary in common, or the text is too short.
        BadInputError: a checkpoint cannot be read, or its logits are NaN or infinite.
    """
    sides = (one, other)
    if any(side.config for side in sides) and not any(is_mtj(side.path) for side in sides):
        raise UsageError(
            f"--config {one.config}: only the original's checkpoints need one: leave it"
        )
    first = one.load()
    tokens = _tokens(first, text, length)
    logits = _finite_logits(first, one, tokens)
    rows = first.config.vocab_size
    del first
    second = other.load()
    if second.config.vocab_size != rows:
        raise UsageError(
            f"{one.path} has {rows} rows of vocabulary and {other.path} "
            f"{second.config.vocab_size}: their logits cannot be compared"
        )
    if tokens.shape[1] > second.config.context_length:
        raise UsageError(
            f"{tokens.shape[1]} tokens do not fit the context of {other.path}: give "
            f"--length {second.config.context_length}"
        )
    return measure(logits, _finite_logits(second, other, tokens))


def _finite_logits(model: Model, side: Side, tokens: np.ndarray) -> np.ndarray:
    """Returns a model's logits [T, V]; raises BadInputError where some are NaN or infinite."""
    logits_TV = model.logits(tokens)[0]
    bad = np.argwhere(~np.isfinite(logits_TV))
    if bad.size:
        position, token = bad[0]
        raise BadInputError(
            f"{side.path} ({side.profile}, {side.dtype or 'as stored'}): {len(bad):,} of its "
            f"{logits_TV.size:,} logits are NaN or infinite, the first at position {position}, "
            f"token {token}, though its weights are finite: there is nothing to compare"
        )
    return logits_TV


def measure(one_TV: Float32[np.ndarray, "T V"], other_TV: Float32[np.ndarray, "T V"]) -> Distance:
    """Returns the distance of two models' logits at the same positions; sums are float64."""
    difference = np.abs(one_TV.astype(np.float64) - other_TV)
    log_p, log_q = _log_softmax(one_TV), _log_softmax(other_TV)
    return Distance(
        tokens=len(one_TV),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_logit=float(np.abs(one_TV).max()),
        kl=float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
        top1_agreement=float(np.mean(one_TV.argmax(-1) == other_TV.argmax(-1))),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _tokens(model: Model, text: str | None, length: int) -> np.ndarray:
    length = min(length, model.config.context_length)
    if model.tokenizer is None:
        if text is not None:
            raise UsageError("the model has no tokenizer to read a text with: leave it out")
        return np.array([spread_tokens(model.config.vocab_size, length)], np.int32)
    ids = model.encode(SAMPLE_TEXT if text is None else text)[:length]
    if not ids:
        raise UsageError("the text to compare on is empty: give at least one token")
    return np.array([ids], np.int32)
