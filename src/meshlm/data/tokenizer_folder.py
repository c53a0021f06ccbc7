"""The tokenizer of a model's folder, read as transformers' AutoTokenizer reads it.

The files are tokenizer.json, or GPT-2's vocab.json and merges.txt. Beside them
tokenizer_config.json, special_tokens_map.json and added_tokens.json say more of the added tokens.

Source: transformers 5.23, tokenization_utils_base.py (`_from_pretrained`),
tokenization_utils_tokenizers.py and models/gpt2/tokenization_gpt2.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.lfs import refuse_pointer
from meshlm.data.special_tokens import NAMES, SpecialTokens
from meshlm.data.tokenizer import END_OF_TEXT, Tokenizer, from_json, load_gpt2
from meshlm.data.tokenizer_json import (
    MAX_FILE_BYTES,
    AddedToken,
    SpecialTokenMode,
    make_bpe,
    unusable,
)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
VOCABULARY_FILE, MERGES_FILE, ADDED_FILE = "vocab.json", "merges.txt", "added_tokens.json"
_GPT2_CLASSES = ("", "GPT2Tokenizer", "CodeGenTokenizer")
# So do these, each in another way. Any other class takes tokenizer.json as it is.
_OTHER_CLASSES = (
    "BartTokenizer",
    "BlenderbotTokenizer",
    "ByT5Tokenizer",
    "CanineTokenizer",
    "CohereTokenizer",
    "DebertaTokenizer",
    "DiaTokenizer",
    "GPTNeoXTokenizer",
    "LEDTokenizer",
    "LukeTokenizer",
    "MBart50Tokenizer",
    "MvpTokenizer",
    "NougatTokenizer",
    "PerceiverTokenizer",
    "Qwen2Tokenizer",
    "Qwen3_5Tokenizer",
    "RagTokenizer",
    "RobertaTokenizer",
    "WhisperTokenizer",
)
_BEHIND_ALL = 1 << 40
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


class ReadTokenizer(NamedTuple):
    """A tokenizer, and what its folder declares beside it."""

    tokenizer: Tokenizer
    special_tokens: SpecialTokens
    """Texts and mode; its ids are left open, for they are the model's to declare."""


def read_tokenizer(name_or_path: str | Path) -> ReadTokenizer:
    """Returns the tokenizer "gpt2", that of a tokenizer.json, or that of a folder's files.

    Added tokens are parsed in texts unless the tokenizer is "gpt2", or a store's or a checkpoint's
    that says otherwise.

    Raises:
        UsageError: there is no such file.
        BadInputError: the files are not those of a byte-level BPE that can be used, or damaged.
    """
    if name_or_path == "gpt2":
        return ReadTokenizer(load_gpt2(), SpecialTokens.of(load_gpt2()))
    path = Path(name_or_path)
    if not path.exists():
        raise UsageError(
            f"{path}: there is no such tokenizer; give gpt2, a {TOKENIZER_FILE}, or a folder that "
            "holds one"
        )
    own = _read_own(path if path.is_dir() else path.parent)
    if own is not None:
        return _read_file(path / TOKENIZER_FILE if path.is_dir() else path, *own)
    if not path.is_dir():
        return _read_file(path, "parse", None)
    found = find_tokenizer(path)
    if found is None:
        raise UsageError(
            f"{path}: no tokenizer in it; give gpt2, a {TOKENIZER_FILE}, or a folder that holds "
            f"one, or {VOCABULARY_FILE} and {MERGES_FILE}"
        )
    return found


def find_tokenizer(folder: Path, tokenizer_class: str | None = None) -> ReadTokenizer | None:
    """Returns the tokenizer of a Hugging Face folder's files; None where it has none.

    Args:
        tokenizer_class: that of its config.json.

    Raises:
        BadInputError: the files are not those of a byte-level BPE that can be used, or damaged.
    """
    has_json = (folder / TOKENIZER_FILE).is_file()
    if not has_json and not all(
        (folder / name).is_file() for name in (VOCABULARY_FILE, MERGES_FILE)
    ):
        return None
    settings = _read_optional(folder / TOKENIZER_CONFIG)
    class_name = str(settings.get("tokenizer_class") or tokenizer_class or "").removesuffix("Fast")
    is_gpt2 = class_name in _GPT2_CLASSES
    where = str(folder / TOKENIZER_FILE)
    if not has_json:
        where = f"{folder / VOCABULARY_FILE} and {MERGES_FILE}"
    try:
        whole = _read_object(folder / TOKENIZER_FILE) if has_json else _legacy_json(folder)
        if class_name in _OTHER_CLASSES:
            raise BadInputError(
                f"{folder / TOKENIZER_CONFIG}: tokenizer_class is {class_name}, which does not "
                "encode texts as tokenizer.json says, and MeshLM has no such class; if the model "
                "was trained with tokenizer.json, set tokenizer_class to PreTrainedTokenizerFast"
            )
        if not has_json:
            _refuse_added_ends(settings)
        if is_gpt2 or not has_json:
            whole = _as_gpt2(whole, settings)
        declared = _set_added_tokens(whole, folder, settings, is_gpt2=is_gpt2)
        tokenizer = Tokenizer(make_bpe(whole), declared.eos_token)
    except BadInputError as error:
        prefix = "" if str(error).startswith(str(folder)) else f"{where}: "
        raise BadInputError(f"{prefix}{error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{where}, or {TOKENIZER_CONFIG} beside it: a part is malformed ({error})"
        ) from None
    mode: SpecialTokenMode = "text" if settings.get("split_special_tokens") is True else "parse"
    ordinary = next((token.content for token in tokenizer.added if not token.special), None)
    if mode == "text" and ordinary is not None:
        raise BadInputError(
            f"{folder / TOKENIZER_CONFIG}: split_special_tokens is true, and {ordinary[:40]!r} is "
            "an added token that is not special: MeshLM parses all added tokens or none; set "
            "split_special_tokens to false, or special to true"
        )
    return ReadTokenizer(tokenizer, dataclasses.replace(declared, mode=mode))


def _read_file(path: Path, mode: SpecialTokenMode, eos_token: str | None) -> ReadTokenizer:
    """Returns the tokenizer of a tokenizer.json by itself."""
    try:
        tokenizer = from_json(_read_bytes(path), eos_token)
    except BadInputError as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}: "
        raise BadInputError(f"{prefix}{error}") from None
    special_tokens = dataclasses.replace(SpecialTokens.of(tokenizer, mode), eos_token_ids=())
    return ReadTokenizer(tokenizer, special_tokens)


def _read_own(folder: Path) -> tuple[SpecialTokenMode, str | None] | None:
    """Returns mode and eos_token of a token store or a checkpoint; None where it is neither."""
    manifest = _read_quietly(folder / "manifest.json")
    if not str(manifest.get("format")).startswith("meshlm-"):
        return None
    entry = manifest.get("tokenizer")
    if isinstance(entry, dict):
        kept = {"mode": entry.get("special_tokens"), "eos_token": entry.get("end_of_text")}
    else:
        config = _read_quietly(folder / "config.json")
        run = config.get("run", config)
        kept = (run.get("special_tokens") if isinstance(run, dict) else None) or {}
    eos_token = kept.get("eos_token")
    mode: SpecialTokenMode = "parse" if kept.get("mode") == "parse" else "text"
    return mode, eos_token if isinstance(eos_token, str) else None


def _read_quietly(path: Path) -> dict[str, Any]:
    try:
        return _read_optional(path)
    except BadInputError:
        return {}


def _legacy_json(folder: Path) -> dict[str, Any]:
    """Returns a tokenizer.json made of GPT-2's own two files."""
    lines = _read_text(folder / MERGES_FILE).replace("\r\n", "\n").split("\n")
    if lines and lines[0].startswith("#version"):
        del lines[0]
    return {
        "added_tokens": [],
        "decoder": _BYTE_LEVEL,
        "pre_tokenizer": _BYTE_LEVEL,
        "model": {
            "vocab": _read_object(folder / VOCABULARY_FILE),
            "merges": [line for line in lines if line],
        },
    }


def _refuse_added_ends(settings: Mapping[str, Any]) -> None:
    """Raises BadInputError where texts get a bos or an eos. Beside a tokenizer.json these settings
    have no effect in transformers either."""
    for name in ("add_bos_token", "add_eos_token"):
        if settings.get(name):
            raise BadInputError(
                f"{TOKENIZER_CONFIG} has {name}, which MeshLM does not do: set it to false, and "
                "put the token into your prompts"
            )


def _as_gpt2(whole: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what GPT2Tokenizer makes of a tokenizer.json: all else in it has no effect there."""
    model = {
        name: whole["model"][name] for name in ("type", "vocab", "merges") if name in whole["model"]
    }
    return {
        "added_tokens": whole["added_tokens"],
        "decoder": _BYTE_LEVEL,
        "pre_tokenizer": _BYTE_LEVEL
        | {"add_prefix_space": settings.get("add_prefix_space") is True},
        "post_processor": whole.get("post_processor"),
        "model": model,
    }


def _set_added_tokens(
    whole: dict[str, Any], folder: Path, settings: Mapping[str, Any], *, is_gpt2: bool
) -> SpecialTokens:
    """Puts every added token of the folder's files into `whole`; returns the special ones."""
    listed = settings.get("added_tokens_decoder")
    extra = {} if listed is not None else _read_optional(folder / SPECIAL_TOKENS_MAP)
    declared = {**settings, **extra}
    if not is_gpt2 and whole.get("padding"):
        declared.setdefault("pad_token", whole["padding"]["pad_token"])
    named = {name: _content(declared.get(name)) for name in NAMES}
    known = {token["content"] for token in whole["added_tokens"]} | whole["model"]["vocab"].keys()
    # GPT2Tokenizer's own defaults; where another eos is declared, they are not added for that.
    if is_gpt2 and (END_OF_TEXT in known or "eos_token" not in declared):
        for name in ("bos_token", "eos_token", "unk_token"):
            if name not in declared:
                named[name] = END_OF_TEXT
    specials = {text for text in named.values() if text is not None}
    added: dict[str, dict[str, Any]] = {}
    if listed is None:
        for text, token in _read_optional(folder / ADDED_FILE).items():
            is_special = text in specials
            added[text] = {
                "content": text,
                "id": token,
                "special": is_special,
                "normalized": not is_special,
            }
    added |= {entry["content"]: entry for entry in whole["added_tokens"]}
    for token, entry in (listed or {}).items():
        added[entry["content"]] = {**entry, "id": int(token)}
    _check_each_once(whole["added_tokens"], added)
    values = [declared.get(name) or named[name] for name in NAMES]
    others = list(_other_specials(declared))
    new: dict[str, int] = {}
    for value in [*values, *others]:
        text = _content(value)
        if text is None:
            continue
        flags = {k: v for k, v in value.items() if k != "__type"} if isinstance(value, dict) else {}
        if text not in added or text in new:
            # Where it is named twice, its last flags count.
            new.setdefault(text, _BEHIND_ALL + len(added))
            added[text] = {"id": new[text], **flags}
        added[text]["special"] = True
    fields = [field.name for field in dataclasses.fields(AddedToken)]
    whole["added_tokens"] = [
        {name: value for name, value in entry.items() if name in fields} | {"content": text}
        for text, entry in added.items()
    ]
    other_texts = dict.fromkeys(text for text in map(_content, others) if text is not None)
    texts: dict[str, Any] = named
    return SpecialTokens(**texts, others=tuple(other_texts))


def _check_each_once(
    entries: Sequence[Mapping[str, Any]], added: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises BadInputError where added tokens share an id, or one is listed twice.

    Args:
        entries: of tokenizer.json.
        added: those of all files, by content.
    """
    contents: set[str] = set()
    ids: dict[int, str] = {}
    for entry in (*entries, *added.values()):
        content = entry["content"]
        other = ids.setdefault(entry["id"], content)
        if other != content:
            raise unusable(
                f"its added tokens {other[:40]!r} and {content[:40]!r} both have id {entry['id']}, "
                f"there or in {ADDED_FILE} or {TOKENIZER_CONFIG}: delete the wrong one"
            )
    for content in (entry["content"] for entry in entries):
        if content in contents:
            raise unusable(f"its added token {content[:40]!r} is listed twice: delete one")
        contents.add(content)


def _other_specials(declared: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the special tokens beside the usual ones, in transformers' order."""
    for name, value in declared.items():
        is_token = isinstance(value, str) or (isinstance(value, dict) and "__type" in value)
        if name.endswith("_token") and name not in NAMES and is_token:
            yield value
    value = declared.get("extra_special_tokens") or declared.get("additional_special_tokens") or []
    yield from value.values() if isinstance(value, dict) else value


def _content(value: Any) -> str | None:
    """Returns the text of a token, given as text or as an object with its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise TypeError(f"a special token is {str(value)[:80]}")
    return text or None


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    return strict_json.parse_object(
        _read_bytes(path),
        str(path),
        max_bytes=MAX_FILE_BYTES,
        remedy="get the file again",
        not_finite=float,  # transformers writes Infinity as a length without a limit
    )


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError:
        raise BadInputError(f"{path}: not UTF-8 text") from None


def _read_bytes(path: Path) -> bytes:
    try:
        refuse_pointer(path)
        return files.read(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise UsageError(
            f"{path}: there is no such file; give gpt2, a {TOKENIZER_FILE}, or a folder that holds "
            "one"
        ) from None
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror})") from None
