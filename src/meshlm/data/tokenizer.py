"""Tokenizers: text to token ids and back, GPT-2's own and byte-level BPE trained on a corpus.

The ids of a trained tokenizer are laid out as GPT-2's: 256 bytes, then the merges in order, then
`<|endoftext|>` last. Each tokenizer is one canonical `tokenizer.json` that Hugging Face's
`tokenizers` reads, so that the same tokenizer has the same bytes and the same fingerprint whichever
tool wrote the file it came from.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from meshlm.core.errors import BadInputError, UsageError
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

END_OF_TEXT = "<|endoftext|>"
GPT2_FINGERPRINT = "36636125b8f0af3115a3df0930dfecd8acdc211ce90db64d658da7bcc1f331e8"
# What fills GPT-J's vocabulary from GPT-2's 50,257 tokens to the 50,400 rows of its matrices.
_EXTRA_TOKEN = re.compile(r"<\|extratoken_[0-9]+\|>")
MAX_FILE_BYTES = 256 << 20
_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZER = _BYTE_LEVEL | {"add_prefix_space": False}


class Tokenizer:
    """Text to token ids and back. Immutable.

    Attributes:
        name: "gpt2", or "bpe-" and the vocabulary's size.
        vocab_size: ids are 0 .. vocab_size - 1.
        text_vocab_size: ids from here on are GPT-J's extra tokens, which no text ever becomes.
        end_of_text_id: id of `<|endoftext|>`, which ends each document.
        fingerprint: sha256 of `to_json()`, in hex.
    """

    name: str
    vocab_size: int
    text_vocab_size: int
    end_of_text_id: int
    fingerprint: str

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[Merge],
        specials: Mapping[str, int],
        *,
        pre_tokenizer: Mapping[str, Any] = _PRE_TOKENIZER,
        ignore_merges: bool = False,
    ) -> None:
        """Args: vocabulary: entry in the byte alphabet -> id, without the specials: text -> id."""
        self._json = _canonical_json(vocabulary, merges, specials, pre_tokenizer, ignore_merges)
        self._specials = dict(specials)
        self._special_pattern = re.compile(
            "(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")"
        )
        ids = {to_bytes(entry): token for entry, token in vocabulary.items()}
        table = {token: data for data, token in ids.items()}
        table |= {token: text.encode() for text, token in specials.items()}
        self._token_bytes = [table[token] for token in range(len(table))]
        self.vocab_size = len(table)
        extra = [token for text, token in specials.items() if _EXTRA_TOKEN.fullmatch(text)]
        after = sum(token >= min(extra) for token in specials.values()) if extra else 0
        # What comes after extra tokens is no text either, if it is all special.
        is_last = bool(extra) and after == len(table) - min(extra)
        self.text_vocab_size = min(extra) if is_last else len(table)
        self.end_of_text_id = self._specials[END_OF_TEXT]
        self.fingerprint = hashlib.sha256(self._json).hexdigest()
        is_gpt2 = self.fingerprint == GPT2_FINGERPRINT
        self.name = "gpt2" if is_gpt2 else f"bpe-{self.vocab_size}"
        self._engine: Engine
        if pre_tokenizer == _PRE_TOKENIZER and (is_gpt2 or is_greedy(vocabulary, merges)):
            self._engine = TiktokenEngine(ids)
        else:
            self._engine = HuggingFaceEngine(_without_specials(self._json))

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, {self.fingerprint[:12]})"

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. `<|endoftext|>` in it is text, unless `allow_special`.

        Raises:
            BadInputError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        if not allow_special:
            return self.encode_array(text).tolist()
        tokens: list[int] = []
        for part in self._special_pattern.split(text):
            special = self._specials.get(part)
            tokens.extend(self.encode_array(part).tolist() if special is None else [special])
        return tokens

    def with_extra_tokens(self, rows: int) -> "Tokenizer":
        """This tokenizer with `<|extratoken_1|>` and on for ids from its size up to `rows`."""
        if rows <= self.vocab_size:
            return self
        whole = json.loads(self._json)
        first = self.text_vocab_size
        whole["added_tokens"] += [
            {"id": token, "content": f"<|extratoken_{token - first + 1}|>"}
            for token in range(self.vocab_size, rows)
        ]
        return from_json(json.dumps(whole).encode())

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, uint32 [n]; specials in it are text. Raises as `encode`."""
        try:
            return self._engine.encode(text)
        except UnicodeEncodeError as error:
            raise BadInputError(
                f"the text has a lone surrogate, U+{ord(error.object[error.start]):04X}, at "
                f"character {error.start}: this is not Unicode text"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32, encoded on all cores; specials in them are text."""
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


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer "gpt2", or that of a tokenizer.json or of a folder that holds one.

    Raises:
        UsageError: there is no such file.
        BadInputError: the file is not a byte-level BPE that this room can hold.
    """
    if name_or_path == "gpt2":
        return load_gpt2()
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadInputError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB is no tokenizer.json")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read this tokenizer ({error.strerror}); "
            "give gpt2, a tokenizer.json, or a folder that holds one"
        ) from None
    try:
        return from_json(data)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None


def from_json(data: bytes) -> Tokenizer:
    """The tokenizer in a Hugging Face tokenizer.json.

    Raises:
        BadInputError: not JSON, not byte-level BPE, or one that changes or marks the text (a
        normaliser, a
            prefix space), or without `<|endoftext|>`.
    """
    if hashlib.sha256(data).hexdigest() == GPT2_FINGERPRINT:
        return load_gpt2()
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unusable("it is not JSON") from error
    try:
        return _from_dict(loaded)
    except BadInputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(f"a part is missing or malformed ({error})") from error


def _from_merges(merges: Sequence[Merge]) -> Tokenizer:
    entries = [*CHARACTER_TO_BYTE, *(left + right for left, right in merges)]
    vocabulary = {entry: token for token, entry in enumerate(entries)}
    return Tokenizer(vocabulary, merges, {END_OF_TEXT: len(vocabulary)})


def _from_dict(loaded: dict[str, Any]) -> Tokenizer:
    model, pre_tokenizer = loaded["model"], loaded["pre_tokenizer"]
    _check_kind(loaded)
    specials = {token["content"]: token["id"] for token in loaded["added_tokens"]}
    vocabulary = {entry: i for entry, i in model["vocab"].items() if entry not in specials}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges: list[Merge] = [(left, right) for left, right in pairs]
    _check_vocabulary(vocabulary, merges, specials)
    last = _last_step(pre_tokenizer)
    # trim_offsets concerns character offsets only, which nothing here uses.
    if pre_tokenizer is last and last.get("use_regex", True):
        pre_tokenizer = _PRE_TOKENIZER
    ignore_merges = bool(model.get("ignore_merges"))
    return Tokenizer(
        vocabulary, merges, specials, pre_tokenizer=pre_tokenizer, ignore_merges=ignore_merges
    )


def _check_kind(loaded: dict[str, Any]) -> None:
    model, last = loaded["model"], _last_step(loaded["pre_tokenizer"])
    if model.get("type", "BPE") != "BPE":
        raise _unusable(f"its model is {model['type']}")
    if last.get("type") != "ByteLevel" or (loaded.get("decoder") or {}).get("type") != "ByteLevel":
        raise _unusable("it does not work on bytes")
    if loaded.get("normalizer"):
        raise _unusable("it has a normaliser, so text would not come back as it went in")
    if last.get("add_prefix_space", True):
        raise _unusable("it adds a space before the text")
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for key in odd:
        if model.get(key):
            raise _unusable(f"its model uses {key}")


def _last_step(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    if pre_tokenizer is None:
        return {}
    if pre_tokenizer.get("type") == "Sequence":
        return pre_tokenizer["pretokenizers"][-1]
    return pre_tokenizer


def _check_vocabulary(
    vocabulary: Mapping[str, int], merges: Sequence[Merge], specials: Mapping[str, int]
) -> None:
    if END_OF_TEXT not in specials:
        raise _unusable(f"it has no special token {END_OF_TEXT}, which has to end each document")
    missing = CHARACTER_TO_BYTE.keys() - vocabulary.keys()
    if missing:
        raise _unusable(f"{len(missing)} of the 256 bytes have no token")
    strange = next((e for e in vocabulary if not CHARACTER_TO_BYTE.keys() >= set(e) or not e), None)
    if strange is not None:
        raise _unusable(f"its entry {strange!r} is outside the byte alphabet")
    ids = sorted([*vocabulary.values(), *specials.values()])
    if ids != list(range(len(ids))):
        raise _unusable(f"its {len(ids)} ids are not 0 .. {len(ids) - 1}, each once")
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise _unusable(f"its merge {merge!r} is not of entries in the vocabulary")


def _unusable(why: str) -> BadInputError:
    return BadInputError(f"this tokenizer.json cannot be used: {why}; it must be a byte-level BPE")


def _canonical_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[Merge],
    specials: Mapping[str, int],
    pre_tokenizer: Mapping[str, Any],
    ignore_merges: bool,
) -> bytes:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": token, "content": text, "special": True} | flags
        for text, token in sorted(specials.items(), key=lambda item: item[1])
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {**vocabulary, **specials},
        "merges": [" ".join(merge) for merge in merges],  # the form that old versions read too
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": model,
    }
    text = json.dumps(whole, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode() + b"\n"


def _without_specials(tokenizer_json: bytes) -> str:
    return json.dumps(json.loads(tokenizer_json) | {"added_tokens": []})
