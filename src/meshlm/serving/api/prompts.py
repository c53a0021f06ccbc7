"""The prompts of a request: four forms to token ids that fit the context, or a refusal."""

import dataclasses
from typing import Any

from meshlm.core.errors import BadInputError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer
from meshlm.data.tokenizer_json import SpecialTokenMode
from meshlm.serving.api.protocol import shorten
from meshlm.serving.config import Limits
from meshlm.serving.engine import Loaded
from meshlm.serving.errors import ApiError, bad_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt."""

    tokens: tuple[int, ...]
    """At least one."""
    text: str
    """What `echo` gives back: a text as it came, or that of the ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a prompt is read with."""

    tokenizer: Tokenizer
    special_tokens: SpecialTokens
    size: int
    """Ids from here on are in no prompt."""
    context_length: int

    @classmethod
    def of(cls, loaded: Loaded) -> "Vocabulary":
        """Returns that of what is served."""
        shape = loaded.model.shape
        return cls(
            tokenizer=loaded.tokenizer,
            special_tokens=loaded.special_tokens,
            size=shape.allowed_vocab,
            context_length=shape.config.context_length,
        )


def read_prompts(
    value: Any, vocabulary: Vocabulary, limits: Limits, keep: int | None = None
) -> list[Prompt]:
    """Returns the prompts of a text, a list of texts, token ids, a list of such, or null.

    null and an empty text stand for the start of a text: bos, else end-of-text, one token.

    Args:
        keep: cut each prompt to its last so many tokens.

    Raises:
        ApiError: 400, for another type, an id that is no token, or too many prompts.
    """
    if value is None or isinstance(value, str):
        return [_read_one("prompt", value or "", vocabulary, keep)]
    if not isinstance(value, list):
        raise _wrong("prompt", value)
    if not value:
        raise bad_field("prompt", "prompt is an empty list: give a prompt, or null")
    if _is_id(value[0]):
        return [_read_one("prompt", value, vocabulary, keep)]
    if len(value) > limits.max_prompts:
        raise bad_field(
            "prompt", f"prompt has {len(value)} prompts: give at most {limits.max_prompts}"
        )
    kind = type(value[0])
    for place, item in enumerate(value):
        if not isinstance(item, str | list) or type(item) is not kind:
            raise _wrong(f"prompt[{place}]", item)
    return [
        _read_one(f"prompt[{place}]", item, vocabulary, keep) for place, item in enumerate(value)
    ]


_SHORTEN = "shorten the prompt, lower max_tokens, or set truncate_prompt_tokens"


def check_fits(
    name: str, prompt: Prompt, max_tokens: int, context_length: int, remedy: str = _SHORTEN
) -> None:
    """Raises the 400 `context_length_exceeded` where prompt and new tokens do not fit together."""
    total = len(prompt.tokens) + max_tokens
    if total > context_length:
        shown = total if total < 10**40 else shorten(total)
        raise bad_field(
            name,
            f"this model's context holds {context_length} tokens and the request asks for {shown}: "
            f"{len(prompt.tokens)} in the prompt and {shorten(max_tokens)} to generate; {remedy}",
            code="context_length_exceeded",
        )


def encode_text(
    name: str, text: str, vocabulary: Vocabulary, mode: SpecialTokenMode | None = None
) -> list[int]:
    """Returns the ids of a text.

    Args:
        mode: what the spelling of a special token becomes; None for the server's way.

    Raises:
        ApiError: 400, where it is no Unicode text, or becomes a token that the model has no row
            for.
    """
    tokenizer = vocabulary.tokenizer
    try:
        tokens = tokenizer.encode(text, mode or vocabulary.special_tokens.mode)
    except BadInputError as error:
        raise bad_field(name, f"{name}: {error}") from None
    wrong = next((token for token in tokens if token >= vocabulary.size), None)
    if wrong is not None:
        raise bad_field(
            name,
            f"{name} has {shorten(tokenizer.decode([wrong]))}, token {wrong}, which has no row in "
            "the model: take it out",
        )
    return tokens


def check_ids(name: str, ids: list[Any], size: int) -> None:
    """Raises the 400 that names the first of `ids` that is no token id."""
    for place, item in enumerate(ids):
        if not _is_id(item):
            raise _wrong(f"{name}[{place}]", item)
        if not 0 <= item < size:
            raise bad_field(
                f"{name}[{place}]",
                f"{name}[{place}] is {shorten(item)}: give token ids from 0 to {size - 1}",
            )


def _read_one(
    name: str, value: str | list[Any], vocabulary: Vocabulary, keep: int | None
) -> Prompt:
    tokenizer = vocabulary.tokenizer
    if isinstance(value, str):
        text, tokens = value, encode_text(name, value, vocabulary)
    else:
        if not value:
            raise bad_field(name, f"{name} is an empty list: give token ids, or a text")
        check_ids(name, value, vocabulary.size)
        text, tokens = None, value
    if keep is not None and len(tokens) > keep:
        text, tokens = None, tokens[-keep:]
    shown = tokenizer.decode(tokens) if text is None else text
    if not tokens:
        start = vocabulary.special_tokens.start_id(tokenizer, vocabulary.size)
        assert start is not None  # the end of text has a row
        tokens = [start]
    return Prompt(tokens=tuple(tokens), text=shown)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, value: Any) -> ApiError:
    return bad_field(
        name,
        f"{name} is {shorten(value)}: give a text, a list of texts, a list of token ids, or a list "
        "of such lists",
    )
