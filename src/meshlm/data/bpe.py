"""Byte-level byte-pair encoding: GPT-2's byte alphabet and merges, and the two engines that encode.

tiktoken encodes about four times as fast as `tokenizers` (docs/data.md has the figures), so it is
used wherever `is_greedy` proves that both give the same ids. `tokenizers` encodes the rest, and
trains.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Protocol

import numpy as np
import tiktoken
import tokenizers

from meshlm.core.errors import BadInputError

GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's split into pieces, with possessive quantifiers: the same pieces, without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# A stretch this long without a place where a cut changes nothing is cut anyway, to bound memory
# (tiktoken needs about 60 bytes for each byte of one piece).
MAX_UNBROKEN_CHARACTERS = 1 << 20
_SEGMENT_CHARACTERS = 1 << 16
# Unicode's White_Space, which is what \s is to both engines; Python's own \s has four more.
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CUT = re.compile(f"[{_WHITE_SPACE}](?=[^{_WHITE_SPACE}])")
# Training rereads a word for each merge it takes part in: a megabyte without white space would take
# hours.
_LONG_WORD = re.compile(r"(\S{256}(?=\S)|\s{256}(?=\s))")

Merge = tuple[str, str]


def _byte_alphabet() -> dict[int, str]:
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(shown))
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTE_TO_CHARACTER = _byte_alphabet()
"""The printable character that stands for each byte in a vocabulary file, in the order of GPT-2's
ids.

Source: GPT-2, encoder.py, bytes_to_unicode.
"""
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
_TO_LATIN1 = {ord(character): byte for character, byte in CHARACTER_TO_BYTE.items()}


def load_gpt2_merges() -> list[Merge]:
    """GPT-2's 50,000 merges in order, from package data.

    Raises:
        BadInputError: the file is not the one OpenAI published.
    """
    data = (resources.files("meshlm.data") / "gpt2" / "vocab.bpe").read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != GPT2_MERGES_SHA256:
        raise BadInputError(
            f"GPT-2's vocab.bpe has sha256 {found[:12]}, expected {GPT2_MERGES_SHA256[:12]}: "
            "the installation is damaged, reinstall meshlm"
        )
    lines = data.decode().splitlines()[1:]
    return [(left, right) for left, right in (line.split() for line in lines)]


def to_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry, in the byte alphabet, stands for."""
    return token.translate(_TO_LATIN1).encode("latin-1")


class Engine(Protocol):
    """What turns text into ids; `<|endoftext|>` and its like are text to it."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [n]. Raises UnicodeEncodeError for a lone surrogate."""
        ...


class TiktokenEngine:
    """Encodes with tiktoken: fast, for vocabularies that pass `is_greedy` and GPT-2's pattern."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._encoding = tiktoken.Encoding(
            "meshlm", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [n]: those of the whole text, though long texts go in segments."""
        if len(text) <= _SEGMENT_CHARACTERS:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        parts = [
            self._encoding.encode_to_numpy(part, disallowed_special=()) for part in segments(text)
        ]
        return np.concatenate(parts)


class HuggingFaceEngine:
    """Encodes with `tokenizers`: slower, any byte-level BPE."""

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, uint32 [n]."""
        text.encode()  # a lone surrogate is refused here, where tokenizers would raise a TypeError
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.uint32)


def cut_point(text: str, start: int, limit: int) -> int | None:
    """The first place in [start, limit) where `text` may be cut without changing its tokens, or
    None.

    That is before any white space that something else follows. The left part then ends in no white
    space, or in a run of it that was a piece by itself, since `\\s+(?!\\S)` leaves the last one to
    the word behind it.
    """
    match = _CUT.search(text, start, limit + 1)
    return match.start() if match else None


CutPoint = Callable[[str, int, int], int | None]
"""Gives the first place in [start, limit) where a text may be cut without changing its tokens."""


def segments(text: str, cut_point: CutPoint = cut_point) -> Iterator[str]:
    """Parts of `text` that encode, one after another, to the tokens of the whole.

    Only a stretch of more than MAX_UNBROKEN_CHARACTERS without such a place is cut as it comes.
    """
    start = 0
    while len(text) - start > _SEGMENT_CHARACTERS:
        limit = start + MAX_UNBROKEN_CHARACTERS
        cut = cut_point(text, start + _SEGMENT_CHARACTERS, limit)
        stop = min(limit, len(text)) if cut is None else cut
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def is_greedy(vocabulary: Mapping[str, int], merges: Sequence[Merge]) -> bool:
    """Whether merging the pair whose union has the lowest id (tiktoken) equals applying the merges
    in order.

    It does if every entry is the result of one merge, ids rise with the merges, and each entry's
    bytes, merged by the entries before it alone, end as exactly the two halves of its own merge.
    Then no other pair with the same union can ever stand next to each other when its turn comes, in
    any text: as long as no merge crosses the ends of that stretch, what happens inside is what
    happens to the entry alone.

    Args:
        vocabulary: entry -> id, without special tokens.
    """
    results = [left + right for left, right in merges]
    ids = [vocabulary[result] for result in results]
    if len(set(results)) + len(BYTE_TO_CHARACTER) != len(vocabulary) or ids != sorted(set(ids)):
        return False
    return all(
        _merge_below(left + right, vocabulary, token) == [left, right]
        for (left, right), token in zip(merges, ids, strict=True)
    )


def _merge_below(entry: str, ids: Mapping[str, int], limit: int) -> list[str]:
    parts = list(entry)
    while True:
        candidates = [
            (ids.get(left + right, limit), i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
        ]
        lowest, i = min(candidates, default=(limit, 0))
        if lowest >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def train_merges(texts: Iterable[str], count: int) -> list[Merge]:
    """At most `count` merges learned from `texts`, in order; fewer where no pair occurs twice.

    The same texts give the same merges, in any order and on any number of threads. Words of more
    than 256 characters are learned from in parts.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(BYTE_TO_CHARACTER) + count,
        min_frequency=2,
        initial_alphabet=list(CHARACTER_TO_BYTE),
        show_progress=False,
    )
    pieces = (part for text in texts for part in _LONG_WORD.split(text) if part)
    tokenizer.train_from_iterator(pieces, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
