"""The tokenizer files of a Hugging Face folder, written.

GPT-J's published tokenizer is GPT-2's and 143 tokens, `<|extratoken_1|>` and on, that stand for the
embedding's padding rows. They are written as they are there.
"""

import dataclasses
from pathlib import Path
from typing import Any

from meshlm.conversion.hf.config import HfConfig
from meshlm.conversion.hf.json_files import write_json
from meshlm.core import files, strict_json
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer, load_gpt2
from meshlm.data.tokenizer_folder import (
    MERGES_FILE,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    ReadTokenizer,
    find_tokenizer,
)
from meshlm.data.tokenizer_json import AddedToken
from meshlm.model.config import ModelConfig
from meshlm.model.presets import GPT2_VOCAB_SIZE

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


def tokenizer_of(folder: Path, config: HfConfig) -> ReadTokenizer | None:
    """Returns the tokenizer of a folder's files.

    Where it has none, GPT-2's if the model has rows for it and `config` names no other, else None.

    Raises:
        BadInputError: the files are not those of a byte-level BPE, or damaged.
    """
    found = find_tokenizer(folder, config.tokenizer_class)
    if found is not None:
        return found
    ends = config.special_tokens.eos_token_ids
    is_gpt2 = (
        config.model.vocab_size >= GPT2_VOCAB_SIZE
        and config.tokenizer_class in _GPT2_CLASSES
        and (not ends or GPT2_VOCAB_SIZE - 1 in ends)
    )
    return ReadTokenizer(load_gpt2(), SpecialTokens.of(load_gpt2(), "parse")) if is_gpt2 else None


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, special_tokens: SpecialTokens, model: ModelConfig
) -> list[str]:
    """Writes the files from which transformers makes the same tokenizer; returns notes on them."""
    plain = tokenizer.without_extra_tokens()
    is_gpt2 = plain.is_gpt2
    data = (plain if is_gpt2 else tokenizer).to_json()
    whole = strict_json.parse_object(data, TOKENIZER_FILE, max_bytes=len(data))
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    notes = []
    if is_gpt2 and model.vocab_size > GPT2_VOCAB_SIZE:
        padding = _padding(tokenizer, model.vocab_size)
        whole["added_tokens"] += padding
        notes.append(
            f"{TOKENIZER_CONFIG}: {len(padding)} tokens, {padding[0]['content']} and on, stand "
            "for the padding rows, as in the published model"
        )
    special: dict[str, Any] = {
        name: text for name, text in special_tokens.texts.items() if text is not None
    }
    if special_tokens.others:
        # transformers 4 knows them by this name, 5 by it and another.
        special["additional_special_tokens"] = list(special_tokens.others)
    # GPT2Tokenizer takes END_OF_TEXT for a token that is not named; null says that there is none.
    absent = {name: None for name in ("bos_token", "eos_token", "unk_token") if name not in special}
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
        **absent,
    }
    write_json(folder / TOKENIZER_FILE, whole)
    write_json(folder / TOKENIZER_CONFIG, settings)
    write_json(folder / SPECIAL_TOKENS_MAP, special)
    write_json(folder / VOCABULARY_FILE, vocabulary)
    files.write_new(folder / MERGES_FILE, "\n".join(["#version: 0.2", *merges, ""]).encode())
    return notes


def _padding(tokenizer: Tokenizer, vocab_size: int) -> list[dict[str, Any]]:
    """Returns the extra tokens: the tokenizer's own, then more up to the rows."""
    own = {token.id: token for token in tokenizer.added if token.id >= GPT2_VOCAB_SIZE}
    return [
        dataclasses.asdict(own.get(token) or _extra(token))
        for token in range(GPT2_VOCAB_SIZE, max(vocab_size, tokenizer.vocab_size))
    ]


def _extra(token: int) -> AddedToken:
    content = f"<|extratoken_{token - GPT2_VOCAB_SIZE + 1}|>"
    return AddedToken(content=content, id=token, special=False, normalized=True)
