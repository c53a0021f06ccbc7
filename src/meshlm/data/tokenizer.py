"""Tokenizers: text to token ids and back, GPT-2's own and byte-level BPE trained on a corpus.

The ids of a trained tokenizer are laid out as GPT-2's: 256 bytes, then the merges in order, then
`<|endoftext|>` last. Each tokenizer is one canonical `tokenizer.json` that Hugging Face's
`tokenizers` reads, so that the same tokenizer has the same bytes and the same fingerprint whichever
tool wrote the file it came from.
"""

import copy
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from meshlm.core.errors import BadInputError, UsageError
from meshlm.data import bpe
from meshlm.data.bpe import (
    BYTE_TO_CHARACTER,
    CHARACTER_TO_BYTE,
    Engine,
    HuggingFaceEngine,
    Merge,
    TiktokenEngine,
    is_greedy,
    load_gpt2_merges,
    to_bytes,
    train_merges,
)
from meshlm.data.tokenizer_json import (
    PLAIN_PRE_TOKENIZER,
    AddedToken,
    ByteLevelBPE,
    SpecialTokenMode,
    parse_tokenizer_json,
    unusable,
)

END_OF_TEXT = "<|endoftext|>"
GPT2_FINGERPRINT = "36636125b8f0af3115a3df0930dfecd8acdc211ce90db64d658da7bcc1f331e8"
# What fills GPT-J's vocabulary from GPT-2's 50,257 tokens to the 50,400 rows of its matrices.
_EXTRA_TOKEN = re.compile(r"<\|extratoken_[0-9]+\|>")
# Fine-tunes add it behind all others, and no model is trained to write it.
_PADDING_TOKEN = re.compile(r"\W*pad(ding)?\W*", re.IGNORECASE)


class Tokenizer:
    """Text to token ids and back. Immutable.

    Attributes:
        name: "gpt2", or "bpe-" and the vocabulary's size.
        vocab_size: ids are 0 .. vocab_size - 1.
        text_vocab_size: ids from here on are GPT-J's extra tokens, which are not generated.
        added: the added tokens, by id.
        end_of_text: the token that ends each document.
        end_of_text_id: its id.
        is_gpt2: ids and merges are GPT-2's own.
        fingerprint: sha256 of `to_json()`, in hex.
        special_tokens: what the spelling of an added token becomes, unless a caller says which.
    """

    name: str
    vocab_size: int
    text_vocab_size: int
    added: tuple[AddedToken, ...]
    end_of_text: str
    end_of_text_id: int
    is_gpt2: bool
    fingerprint: str
    special_tokens: SpecialTokenMode = "text"

    def __init__(self, model: ByteLevelBPE, eos_token: str | None = None) -> None:
        """Args: eos_token: ends each document where there is no `<|endoftext|>`.

        Raises:
            BadInputError: there is neither.
        """
        self._model = model
        self._json = model.to_json()
        self.added = tuple(sorted(model.added, key=lambda token: token.id))
        self._ids = {token.content: token.id for token in self.added}
        self.end_of_text = END_OF_TEXT if END_OF_TEXT in self._ids else eos_token or END_OF_TEXT
        if self.end_of_text not in self._ids:
            raise unusable(
                f"it has no special token {self.end_of_text}, which has to end each document, and "
                "no tokenizer_config.json in its folder names another eos_token"
            )
        self.end_of_text_id = self._ids[self.end_of_text]
        contents = sorted(self._ids, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, contents)))
        self._longest_added = len(contents[0])
        ids = {to_bytes(entry): token for entry, token in model.vocabulary.items()}
        table = {token: data for data, token in ids.items()}
        table = {token.id: token.content.encode() for token in self.added} | table
        self._token_bytes = [table[token] for token in range(len(table))]
        self.vocab_size = len(table)
        self.text_vocab_size = _text_vocab_size(self.added, len(table))
        self.fingerprint = hashlib.sha256(self._json).hexdigest()
        self.is_gpt2 = _is_gpt2(model)
        self.name = "gpt2" if self.is_gpt2 else f"bpe-{self.vocab_size}"
        self._engine: Engine
        is_plain = model.pre_tokenizer == PLAIN_PRE_TOKENIZER
        if is_plain and (self.is_gpt2 or is_greedy(model.vocabulary, model.merges)):
            self._engine = TiktokenEngine(ids)
        else:
            self._engine = HuggingFaceEngine(model.to_json(with_added=False).decode())

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, {self.fingerprint[:12]})"

    def with_special_tokens(self, mode: SpecialTokenMode) -> "Tokenizer":
        """This tokenizer with another `special_tokens`."""
        if mode == self.special_tokens:
            return self
        other = copy.copy(self)
        other.special_tokens = mode
        return other

    def encode(self, text: str, special_tokens: SpecialTokenMode | None = None) -> list[int]:
        """Token ids of `text`.

        Args:
            special_tokens: `parse` matches added tokens, such as `<|endoftext|>`, as `tokenizers`
                does; to `text` their spelling is text like any other. None: the tokenizer's own.

        Raises:
            BadInputError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_array(text, special_tokens).tolist()

    def with_extra_tokens(self, rows: int) -> "Tokenizer":
        """This tokenizer with `<|extratoken_1|>` and on for ids from its size up to `rows`."""
        if rows <= self.vocab_size:
            return self
        first = self.text_vocab_size
        extra = [
            AddedToken(content=f"<|extratoken_{token - first + 1}|>", id=token)
            for token in range(self.vocab_size, rows)
        ]
        return self._with_added([*self.added, *extra])

    def without_extra_tokens(self) -> "Tokenizer":
        """This tokenizer without extra tokens at its end."""
        kept = list(self.added)
        while kept[-1].id == self.vocab_size - 1 - (len(self.added) - len(kept)) and (
            _EXTRA_TOKEN.fullmatch(kept[-1].content)
        ):
            kept.pop()
        return self if len(kept) == len(self.added) else self._with_added(kept)

    def _with_added(self, added: Sequence[AddedToken]) -> "Tokenizer":
        return Tokenizer(dataclasses.replace(self._model, added=added), self.end_of_text)

    def id_of(self, content: str) -> int | None:
        """The id of an added token; None where there is none of this spelling."""
        return self._ids.get(content)

    def encode_array(self, text: str, special_tokens: SpecialTokenMode | None = None) -> np.ndarray:
        """Token ids of `text`, uint32 [n]. Raises as `encode`."""
        parses = (special_tokens or self.special_tokens) == "parse" and self._added_pattern.search(
            text
        ) is not None
        try:
            if not parses:
                return self._engine.encode(text)
            cut = functools.partial(self.cut_point, special_tokens="parse")
            parts = [self._parsing_engine.encode(part) for part in bpe.segments(text, cut)]
            return np.concatenate(parts)
        except UnicodeEncodeError as error:
            raise BadInputError(
                f"the text has a lone surrogate, U+{ord(error.object[error.start]):04X}, at "
                f"character {error.start}: this is not Unicode text"
            ) from None

    @functools.cached_property
    def _parsing_engine(self) -> HuggingFaceEngine:
        return HuggingFaceEngine(self._json.decode())

    def cut_point(
        self, text: str, start: int, limit: int, special_tokens: SpecialTokenMode = "text"
    ) -> int | None:
        """The first place in [start, limit) where `text` may be cut without changing its tokens, or
        None."""
        at_space = self._model.add_prefix_space
        place = bpe.cut_point(text, start, limit)
        while place is not None:
            # A part that begins with a space gets no other one.
            is_good = text[place] == " " or not at_space
            if is_good and (special_tokens == "text" or self._is_far_from_added(text, place)):
                return place
            place = bpe.cut_point(text, place + 1, limit)
        return None

    def _is_far_from_added(self, text: str, place: int) -> bool:
        """Whether no added token can reach `place`, not by the white space beside it either."""
        end = place + 1 + self._longest_added
        if end > len(text) or text[place - 1].isspace():
            return False
        return self._added_pattern.search(text, max(0, place - self._longest_added), end) is None

    def count_added(self, text: str, *, but: str = "") -> int:
        """How many added tokens `text` spells, those spelled `but` left out."""
        return sum(match[0] != but for match in self._added_pattern.finditer(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32, encoded on all cores."""
        with ThreadPoolExecutor() as threads:  # both engines leave the GIL while they encode
            return list(threads.map(self.encode_array, texts))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`: their bytes joined, read as UTF-8 with U+FFFD for what is not.

        Raises:
            ValueError: a token that is not in 0 .. vocab_size - 1.
        """
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for. Raises ValueError as `decode`."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} is not in 0 .. {self.vocab_size - 1} of {self.name}")
        return self._token_bytes[token]

    def to_json(self) -> bytes:
        """Hugging Face's tokenizer.json, in canonical bytes: `from_json` gives the same
        tokenizer."""
        return self._json


def _text_vocab_size(added: Sequence[AddedToken], vocab_size: int) -> int:
    """The first of the extra tokens at the end of the vocabulary, where only padding follows."""
    size = first_extra = vocab_size
    for token in reversed(added):
        is_extra = _EXTRA_TOKEN.fullmatch(token.content) is not None
        if token.id != size - 1 or not (is_extra or _PADDING_TOKEN.fullmatch(token.content)):
            break
        size -= 1
        first_extra = size if is_extra else first_extra
    return first_extra


def _is_gpt2(model: ByteLevelBPE) -> bool:
    if len(model.added) != 1:
        return False
    plain = [AddedToken(content=token.content, id=token.id) for token in model.added]
    content = dataclasses.replace(model, added=plain).to_json()
    return hashlib.sha256(content).hexdigest() == GPT2_FINGERPRINT


@functools.cache
def load_gpt2() -> Tokenizer:
    """GPT-2's tokenizer: 50,257 ids, equal to tiktoken's "gpt2" (see bpe.MAX_UNBROKEN_CHARACTERS).

    Raises:
        BadInputError: the packaged merges are damaged.
    """
    return _from_merges(load_gpt2_merges())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids learned from `texts`.

    There are fewer where the texts run out of pairs that occur twice. The same texts give the same
    tokenizer.

    Raises:
        UsageError: a size that cannot hold the 256 bytes and `<|endoftext|>`, or is beyond 2**20.
    """
    smallest = len(BYTE_TO_CHARACTER) + 1
    if not smallest <= vocab_size <= 1 << 20:
        raise UsageError(
            f"vocabulary size {vocab_size} is not in {smallest} .. {1 << 20}: "
            f"256 bytes and {END_OF_TEXT} come first, 4096 suits a small model"
        )
    return _from_merges(train_merges(texts, vocab_size - smallest))


def from_json(data: bytes, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer in a Hugging Face tokenizer.json.

    Args:
        eos_token: the added token that ends each document where there is no `<|endoftext|>`.

    Raises:
        BadInputError: not JSON, not byte-level BPE, one that changes the text or adds tokens to it,
            or one without a token to end documents with.
    """
    if hashlib.sha256(data).hexdigest() == GPT2_FINGERPRINT:
        return load_gpt2()
    return Tokenizer(parse_tokenizer_json(data), eos_token)


def _from_merges(merges: Sequence[Merge]) -> Tokenizer:
    entries = [*CHARACTER_TO_BYTE, *(left + right for left, right in merges)]
    vocabulary = {entry: token for token, entry in enumerate(entries)}
    added = [AddedToken(content=END_OF_TEXT, id=len(vocabulary))]
    return Tokenizer(ByteLevelBPE(vocabulary=vocabulary, merges=merges, added=added))
