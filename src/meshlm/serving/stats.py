"""The engine's counts."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts since the start, and what is so now."""

    running: int = 0
    """Requests that have a slot or are in prefill."""
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    decode_steps: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts that were taken up, the reused ones included."""
    cached_tokens: int = 0
    """Of those, tokens whose keys and values were there from an earlier prompt."""
    generated_tokens: int = 0
    compilations: int = 0
    """Functions compiled in this process since the engine started, whoever compiled them."""
    slots: int = 0
    places_used: int = 0
    """Positions of the key-value cache in use, over all slots."""
    places: int = 0
    """Positions of all slots: slots times context length."""
    prefix_bytes: int = 0


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What the worker counts as it goes; read from other threads."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    decode_steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
