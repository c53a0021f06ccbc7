"""Every bound and size of the server. `meshlm serve` has an option for each."""

import dataclasses

from meshlm.core.errors import UsageError
from meshlm.generation.config import MAX_ALTERNATIVES

_MOST_SLOTS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How many samples are decoded at once, and what memory may be used for it."""

    slots: int = 8
    """Samples that are decoded together; further ones wait."""
    max_queue: int = 128
    """Samples that may wait; more are refused with 429."""
    prefill_chunk: int = 128
    """Tokens of a prompt that run between two decoding steps of the others."""
    prefix_cache_bytes: int = 1 << 30
    """Memory for keys and values of earlier prompts, to begin from where a prompt begins alike."""

    def __post_init__(self) -> None:
        _at_least(self, "slots", 1)
        if self.slots > _MOST_SLOTS:
            raise UsageError(f"--slots {self.slots}: give at most {_MOST_SLOTS}")
        _at_least(self, "max_queue", 1)
        _at_least(self, "prefill_chunk", 16)
        _at_least(self, "prefix_cache_bytes", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, one connection and one client may take."""

    max_body_bytes: int = 2 << 20
    """Largest request body; more is refused with 413."""
    max_bodies_bytes: int = 256 << 20
    """All bodies of the requests that are in; more are refused with 503."""
    max_prompts: int = 64
    """Prompts of one request."""
    max_n: int = 16
    """Choices for each prompt."""
    max_best_of: int = 16
    """Samples for each prompt of which the best are returned."""
    max_samples: int = 128
    """Prompts times samples of one request."""
    max_logprobs: int = MAX_ALTERNATIVES
    """Alternatives told with each token."""
    max_stop: int = 16
    """Stop texts of one request."""
    max_stop_chars: int = 256
    """Characters of one stop text."""
    max_logit_bias: int = 1024
    """Entries of logit_bias."""
    request_timeout_s: float = 600.0
    """Time for one request, waiting included; then it fails."""
    header_timeout_s: float = 10.0
    """Time for a request's headers to arrive; then the connection is closed."""
    body_timeout_s: float = 30.0
    """Time for a request's body to arrive; then it is refused with 408."""
    idle_timeout_s: float = 60.0
    """Time that a kept connection may be idle."""
    drain_s: float = 30.0
    """Time for running requests to finish after SIGTERM."""
    max_connections: int = 2048
    """Connections at once; further ones are closed."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0.001 if field.name.endswith("_s") else 1
            zero = field.name in ("drain_s", "max_logprobs", "max_logit_bias")
            _at_least(self, field.name, 0 if zero else least)
        if self.max_bodies_bytes < self.max_body_bytes:
            raise UsageError(
                f"--max-bodies-bytes {self.max_bodies_bytes}: give at least what one body may "
                f"have, --max-body-bytes {self.max_body_bytes}"
            )
        if self.max_logprobs > MAX_ALTERNATIVES:
            raise UsageError(f"--max-logprobs {self.max_logprobs}: give at most {MAX_ALTERNATIVES}")


def _at_least(config: EngineConfig | Limits, name: str, least: float) -> None:
    value = getattr(config, name)
    if not value >= least:
        raise UsageError(f"--{name.replace('_', '-')} {value}: give {least:g} or more")
