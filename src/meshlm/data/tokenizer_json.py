"""Hugging Face's tokenizer.json, read as a byte-level BPE and written in canonical bytes.

The same tokenizer has the same bytes, whichever tool wrote the file it came from.

Source: tokenizers 0.22, `AddedVocabulary::add_tokens` (ids) and `find_matches` (flags).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from meshlm.core import strict_json
from meshlm.core.errors import BadInputError
from meshlm.data.bpe import CHARACTER_TO_BYTE, Merge

SpecialTokenMode = Literal["parse", "text"]
"""What the spelling of an added token in a text becomes: the token, or the characters' tokens."""

MAX_FILE_BYTES = 256 << 20
MAX_ADDED_CHARACTERS = 1024
_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
PLAIN_PRE_TOKENIZER: Mapping[str, Any] = _BYTE_LEVEL | {"add_prefix_space": False}
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is matched in a text as a whole, before the text is cut into words."""

    content: str
    id: int
    special: bool = True
    """transformers' `skip_special_tokens` hides it."""
    lstrip: bool = False
    """It takes the white space before it."""
    rstrip: bool = False
    """It takes the white space after it."""
    single_word: bool = False
    """It is no part of a longer word."""
    normalized: bool = False
    """It is matched after those that are not."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "AddedToken":
        """Returns the token of an entry in `added_tokens`. Raises as `parse_tokenizer_json`."""
        content, token = entry["content"], entry["id"]
        if not isinstance(content, str) or type(token) is not int:
            raise TypeError(f"an added token is {str(entry)[:80]}")
        if not 0 < len(content) <= MAX_ADDED_CHARACTERS:
            raise unusable(
                f"its added token {content[:40]!r} has {len(content):,} characters; "
                f"1 to {MAX_ADDED_CHARACTERS:,} are possible"
            )
        flags = {name: entry[name] for name in _FLAGS if name in entry}
        odd = next((name for name, value in flags.items() if type(value) is not bool), None)
        if odd is not None:
            raise TypeError(f"{odd} of the added token {content[:40]!r} is not true or false")
        return cls(content=content, id=token, **flags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteLevelBPE:
    """What a tokenizer.json describes."""

    vocabulary: Mapping[str, int]
    """Entry in the byte alphabet -> id, without added tokens that no merge makes."""
    merges: Sequence[Merge]
    added: Sequence[AddedToken]
    pre_tokenizer: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: PLAIN_PRE_TOKENIZER
    )
    ignore_merges: bool = False

    @property
    def add_prefix_space(self) -> bool:
        """Whether text gets a space before it, at its beginning and after each added token."""
        return any(step.get("add_prefix_space", True) for step in _byte_levels(self.pre_tokenizer))

    def to_json(self, *, with_added: bool = True) -> bytes:
        """Returns the canonical bytes; without added tokens, those in which none is ever matched.

        Added tokens stand in the model's vocabulary too, which fixes their ids.
        """
        added = sorted(self.added, key=lambda token: token.id) if with_added else []
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": self.ignore_merges,
            "vocab": {**self.vocabulary, **{token.content: token.id for token in added}},
            "merges": [" ".join(merge) for merge in self.merges],  # the form of old versions too
        }
        whole = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [dataclasses.asdict(token) for token in added],
            "normalizer": None,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": None,
            "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
            "model": model,
        }
        text = json.dumps(whole, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return text.encode() + b"\n"


def parse_tokenizer_json(data: bytes) -> ByteLevelBPE:
    """Returns what a tokenizer.json describes.

    Raises:
        BadInputError: not JSON, not a byte-level BPE, or one that changes the text or adds tokens
            to it.
    """
    try:
        loaded = strict_json.parse_object(data, "it", max_bytes=MAX_FILE_BYTES)
    except strict_json.JsonError as error:
        raise unusable(str(error)) from None
    return make_bpe(loaded)


def make_bpe(loaded: Any) -> ByteLevelBPE:
    """Returns what the object in a tokenizer.json describes. Raises as `parse_tokenizer_json`."""
    try:
        return _from_dict(loaded)
    except BadInputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unusable(f"a part is missing or malformed ({error})") from error


def unusable(why: str) -> BadInputError:
    """Returns the error of a tokenizer that cannot be used."""
    return BadInputError(f"this tokenizer.json cannot be used: {why}; it must be a byte-level BPE")


def _from_dict(loaded: dict[str, Any]) -> ByteLevelBPE:
    model, pre_tokenizer = loaded["model"], loaded["pre_tokenizer"]
    _check_kind(loaded)
    added = _numbered(list(map(AddedToken.of, loaded["added_tokens"])), model["vocab"])
    contents = {token.content for token in added}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges: list[Merge] = [(left, right) for left, right in pairs]
    # A word that the text's own tokens have already can be an added token too.
    own = CHARACTER_TO_BYTE.keys() | {left + right for left, right in merges}
    vocabulary = {
        entry: i for entry, i in model["vocab"].items() if entry not in contents or entry in own
    }
    _check_vocabulary(vocabulary, merges, added)
    last = _last_step(pre_tokenizer)
    # trim_offsets concerns character offsets only, which nothing here uses.
    if pre_tokenizer is last and last.get("use_regex", True):
        space = bool(last.get("add_prefix_space", True))
        pre_tokenizer = _BYTE_LEVEL | {"add_prefix_space": space}
    ignore_merges = bool(model.get("ignore_merges"))
    return ByteLevelBPE(
        vocabulary=vocabulary,
        merges=merges,
        added=added,
        pre_tokenizer=pre_tokenizer,
        ignore_merges=ignore_merges,
    )


def _numbered(added: Sequence[AddedToken], vocabulary: Mapping[str, int]) -> list[AddedToken]:
    """Returns the tokens with the ids that `tokenizers` and transformers give them.

    That is the id in the model's vocabulary; others are counted on from its size, so that a gap
    before the id in the file is closed.
    """
    size, numbered = len(vocabulary), []
    following = size
    for token in sorted(added, key=lambda token: token.id):
        number = vocabulary.get(token.content, following)
        if type(number) is not int:
            raise TypeError(f"the id of {token.content[:40]!r} is no whole number")
        following = max(following, number + 1)
        numbered.append(dataclasses.replace(token, id=number))
    return numbered


def _check_kind(loaded: dict[str, Any]) -> None:
    model, last = loaded["model"], _last_step(loaded["pre_tokenizer"])
    if model.get("type", "BPE") != "BPE":
        raise unusable(f"its model is {model['type']}")
    if last.get("type") != "ByteLevel" or (loaded.get("decoder") or {}).get("type") != "ByteLevel":
        raise unusable("it does not work on bytes")
    if loaded.get("normalizer"):
        raise unusable("it has a normaliser, so text would not come back as it went in")
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for key in odd:
        if model.get(key):
            raise unusable(f"its model uses {key}")
    if loaded.get("post_processor") and not _adds_nothing(loaded["post_processor"]):
        raise unusable(
            "its post_processor adds tokens to every text, which MeshLM does not: set it to null "
            "in the file and put these tokens into your prompts"
        )


def _adds_nothing(post_processor: Mapping[str, Any]) -> bool:
    """Whether a post-processor leaves the ids of a text as they are."""
    kind = post_processor.get("type")
    if kind == "Sequence":
        return all(map(_adds_nothing, post_processor["processors"]))
    if kind == "TemplateProcessing":
        single = post_processor["single"]
        pieces = single.split() if isinstance(single, str) else single
        return len(pieces) == 1 and ("$" in pieces[0] or "Sequence" in pieces[0])
    return kind == "ByteLevel"


def _byte_levels(pre_tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = (
        pre_tokenizer["pretokenizers"]
        if pre_tokenizer.get("type") == "Sequence"
        else [pre_tokenizer]
    )
    return [step for step in steps if step.get("type") == "ByteLevel"]


def _last_step(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    if pre_tokenizer is None:
        return {}
    if pre_tokenizer.get("type") == "Sequence":
        return pre_tokenizer["pretokenizers"][-1]
    return pre_tokenizer


def _check_vocabulary(
    vocabulary: Mapping[str, int], merges: Sequence[Merge], added: Sequence[AddedToken]
) -> None:
    missing = CHARACTER_TO_BYTE.keys() - vocabulary.keys()
    if missing:
        raise unusable(f"{len(missing)} of the 256 bytes have no token")
    strange = next((e for e in vocabulary if not CHARACTER_TO_BYTE.keys() >= set(e) or not e), None)
    if strange is not None:
        raise unusable(f"its entry {strange!r} is outside the byte alphabet")
    by_text = {**vocabulary, **{token.content: token.id for token in added}}
    ids = sorted(by_text.values())
    if ids != list(range(len(ids))):
        raise unusable(f"its {len(ids)} ids are not 0 .. {len(ids) - 1}, each once")
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise unusable(f"its merge {merge!r} is not of entries in the vocabulary")
