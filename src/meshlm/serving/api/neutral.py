"""Fields of OpenAI's API that are not honoured, each with its neutral values.

A neutral value asks for nothing, as `tools: []` does: the field is taken as left out. So is `null`,
for every field. Any other value would change the answer, and is refused by name.
"""

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]
"""Name of a field -> its neutral values beside null."""

# Of completions and of chats: a client that serves both sends the same fields to either.
REQUEST_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    # Without tools there are no calls, parallel or not, and "auto" is text.
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

MESSAGE_NEUTRAL: Neutral = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning_content": ("",),
    "refusal": (),
    "tool_calls": ([],),
}

TEXT_PART_NEUTRAL: Neutral = {"prompt_cache_breakpoint": ()}

STREAM_OPTIONS_NEUTRAL: Neutral = {"include_obfuscation": (False,)}


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Returns whether a value is null or one of the neutral ones; 0 is not false."""
    return value is None or any(type(value) is type(n) and value == n for n in neutral)
