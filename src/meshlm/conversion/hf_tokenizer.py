"""The tokenizer files of a Hugging Face folder, read and written.

GPT-J's published tokenizer is GPT-2's and 143 tokens, `<|extratoken_1|>` and on, that stand for the
embedding's padding rows. They are read and written as they are: a prompt may have these ids, and no
text becomes one (`Tokenizer.text_vocab_size`).
"""

import json
from pathlib import Path
from typing import Any

from meshlm.conversion.hf_config import HfConfig, end_of_text_of, read_json
from meshlm.core import files
from meshlm.core.errors import BadInputError
from meshlm.data.tokenizer import (
    END_OF_TEXT,
    GPT2_FINGERPRINT,
    MAX_FILE_BYTES,
    Tokenizer,
    from_json,
    load_gpt2,
)
from meshlm.model.config import GPT2_VOCAB_SIZE, ModelConfig

TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARY, _MERGES, _ADDED = "vocab.json", "merges.txt", "added_tokens.json"
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


def find_tokenizer(folder: Path, config: HfConfig) -> Tokenizer | None:
    """Returns the tokenizer of a folder's files.

    Where it has none, GPT-2's if the model has rows for it and `config` names no other, else None.

    Raises:
        BadInputError: the files are not those of a byte-level BPE, or damaged.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return _make_tokenizer(_read_object(folder / TOKENIZER_FILE), str(folder / TOKENIZER_FILE))
    if (folder / _VOCABULARY).is_file() and (folder / _MERGES).is_file():
        return _load_legacy(folder)
    is_gpt2 = (
        config.model.vocab_size >= GPT2_VOCAB_SIZE
        and config.tokenizer_class in _GPT2_CLASSES
        and (not config.end_of_text_ids or GPT2_VOCAB_SIZE - 1 in config.end_of_text_ids)
    )
    return load_gpt2() if is_gpt2 else None


def write_tokenizer(folder: Path, tokenizer: Tokenizer, model: ModelConfig) -> list[str]:
    """Writes the files from which transformers makes the same tokenizer; returns notes on them."""
    whole = json.loads(tokenizer.to_json())
    is_gpt2 = tokenizer.fingerprint == GPT2_FINGERPRINT
    if tokenizer.vocab_size > tokenizer.text_vocab_size == GPT2_VOCAB_SIZE:
        plain = json.loads(tokenizer.to_json())
        _drop_padding(plain)
        if from_json(json.dumps(plain).encode()).fingerprint == GPT2_FINGERPRINT:
            whole, is_gpt2 = plain, True
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    notes = []
    if is_gpt2 and model.vocab_size > GPT2_VOCAB_SIZE:
        padding = _padding(model.vocab_size)
        whole["added_tokens"] += padding
        notes.append(
            f"{_TOKENIZER_CONFIG}: {len(padding)} tokens, {padding[0]['content']} and on, stand "
            "for the padding rows, as in the published model"
        )
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    # GPT2Tokenizer knows one way to cut text into words; the other takes tokenizer.json as it is.
    settings = {
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"}
            for token in whole["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.context_length,
        "tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
        **special,
    }
    write_json(folder / TOKENIZER_FILE, whole)
    write_json(folder / _TOKENIZER_CONFIG, settings)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / _VOCABULARY, vocabulary)
    files.write_new(folder / _MERGES, "\n".join(["#version: 0.2", *merges, ""]).encode())
    return notes


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file for people to read too."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    files.write_new(path, f"{text}\n".encode())


def end_of_text_id(tokenizer: Tokenizer | None, model: ModelConfig) -> int | None:
    """Returns the id that ends a text, or None where nothing says which."""
    return end_of_text_of(model.vocab_size, tokenizer and tokenizer.end_of_text_id)


def _padding(vocab_size: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return [
        {"id": token, "content": _padding_text(token), "normalized": True} | flags
        for token in range(GPT2_VOCAB_SIZE, vocab_size)
    ]


def _padding_text(token: int) -> str:
    return f"<|extratoken_{token - GPT2_VOCAB_SIZE + 1}|>"


def _make_tokenizer(whole: dict[str, Any], where: str) -> Tokenizer:
    try:
        return from_json(json.dumps(whole).encode())
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from None


def _drop_padding(whole: dict[str, Any]) -> None:
    """Takes the padding tokens out, where nothing else comes after GPT-2's ids."""
    added, vocabulary = whole["added_tokens"], whole["model"]["vocab"]
    padding = {t["content"] for t in added if t["content"] == _padding_text(t["id"])}
    kept = [t for t in added if t["content"] not in padding]
    entries = {text: token for text, token in vocabulary.items() if text not in padding}
    if max([*entries.values(), *(t["id"] for t in kept)]) < GPT2_VOCAB_SIZE:
        whole["added_tokens"], whole["model"]["vocab"] = kept, entries


def _load_legacy(folder: Path) -> Tokenizer:
    """Returns the tokenizer of GPT-2's own two files, and what later ones put beside them."""
    settings = _read_optional(folder / _TOKENIZER_CONFIG)
    if settings.get("add_prefix_space"):
        raise BadInputError(f"{folder / _TOKENIZER_CONFIG}: it adds a space before the text")
    vocabulary = _read_object(folder / _VOCABULARY)
    lines = _read_text(folder / _MERGES).replace("\r\n", "\n").split("\n")
    if lines and lines[0].startswith("#version"):
        del lines[0]
    added = {END_OF_TEXT: vocabulary.get(END_OF_TEXT, len(vocabulary))}
    added |= _read_optional(folder / _ADDED)
    whole = {
        "added_tokens": [{"content": text, "id": token} for text, token in added.items()],
        "decoder": _BYTE_LEVEL,
        "pre_tokenizer": _BYTE_LEVEL,
        "model": {"vocab": vocabulary, "merges": [line for line in lines if line]},
    }
    return _make_tokenizer(whole, f"{folder / _VOCABULARY} and {_MERGES}")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        raise BadInputError(f"{path}: not a JSON object")
    return loaded


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadInputError(f"{path}: over {MAX_FILE_BYTES >> 20} MiB, too large for this file")
        return path.read_bytes().decode()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadInputError(f"{path}: not UTF-8 text") from None
