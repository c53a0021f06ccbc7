"""The special tokens that a model's files declare: ids that begin, end and pad its texts."""

import dataclasses
from collections.abc import Sequence

from meshlm.core.errors import UsageError
from meshlm.data.tokenizer import Tokenizer
from meshlm.data.tokenizer_json import SpecialTokenMode

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The special tokens that have a name in transformers, in its order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Special tokens as a model's configuration and its tokenizer's declare them."""

    eos_token_ids: tuple[int, ...] = ()
    """Any of them ends a sample. Empty: the tokenizer's `eos_token` does."""
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    sep_token: str | None = None
    cls_token: str | None = None
    mask_token: str | None = None
    others: tuple[str, ...] = ()
    """The spelling of further special tokens, which have no name."""
    mode: SpecialTokenMode = "text"
    """What their spelling in a text becomes, unless somebody asks for the other."""

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, mode: SpecialTokenMode = "text") -> "SpecialTokens":
        """Returns those of weights that declare nothing: the end of text is bos, eos and unk."""
        if tokenizer is None:
            return cls(mode=mode)
        end = tokenizer.end_of_text
        return cls(
            eos_token_ids=(tokenizer.end_of_text_id,),
            bos_token_id=tokenizer.end_of_text_id,
            bos_token=end,
            eos_token=end,
            unk_token=end,
            mode=mode,
        )

    @property
    def texts(self) -> dict[str, str | None]:
        """The spelling of each named token, by transformers' name."""
        return {name: getattr(self, name) for name in NAMES}

    def end_ids(self, tokenizer: Tokenizer | None) -> tuple[int, ...]:
        """Returns the ids of which any ends a sample; none where nothing says one."""
        if self.eos_token_ids or tokenizer is None:
            return self.eos_token_ids
        found = None if self.eos_token is None else tokenizer.id_of(self.eos_token)
        return (tokenizer.end_of_text_id if found is None else found,)

    def start_id(self, tokenizer: Tokenizer | None, vocab_size: int) -> int | None:
        """Returns the id before the first token of a text: bos, else the end of the text before.

        Args:
            vocab_size: rows of the model; an id without a row begins nothing.
        """
        end = None if tokenizer is None else tokenizer.end_of_text_id
        candidates = (self.bos_token_id, end, *self.eos_token_ids)
        return next((id for id in candidates if id is not None and 0 <= id < vocab_size), None)

    def with_tokenizer(self, other: "SpecialTokens") -> "SpecialTokens":
        """Returns these ids with the texts and the mode of another tokenizer."""
        return dataclasses.replace(self, **other.texts, others=other.others, mode=other.mode)

    def with_ids(self, tokenizer: Tokenizer) -> "SpecialTokens":
        """Returns them with the ids of the texts, where weights declare no ids of their own."""
        ids = {name: self.texts[name] for name in ("bos_token", "pad_token")}
        return dataclasses.replace(
            self,
            eos_token_ids=self.end_ids(tokenizer),
            **{
                f"{name}_id": None if text is None else tokenizer.id_of(text)
                for name, text in ids.items()
            },
        )


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether a tokenizer can be that of a model with so many rows.

    Fine-tunes add tokens, such as one for padding, for which the model gets no row. All others, and
    the end of text, need one.
    """
    rowless = sum(token.id >= vocab_size for token in tokenizer.added)
    is_enough = tokenizer.vocab_size - rowless <= vocab_size
    return is_enough and tokenizer.end_of_text_id < vocab_size


def rowless_note(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Returns a line on tokens beyond the last row of a model, if there are such."""
    count = tokenizer.vocab_size - vocab_size
    if count <= 0:
        return []
    first = tokenizer.decode([vocab_size])
    tokens = "token has" if count == 1 else "tokens have"
    return [
        f"{count:,} {tokens} no row in the model and cannot be used: {first} (id {vocab_size})"
        + (" and on" if count > 1 else "")
    ]


def check_rows(tokens: Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UsageError where a text became a token that the model has no row for."""
    wrong = next((token for token in tokens if token >= vocab_size), None)
    if wrong is not None:
        raise UsageError(
            f"the text has {tokenizer.decode([wrong])!r}, token {wrong}, which has no row in the "
            f"model ({vocab_size} rows): take it out, or encode it as text (--special-tokens text)"
        )
