"""Hugging Face folders' tokenizer files in many forms, for tests here and against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meshlm.data.bpe import CHARACTER_TO_BYTE

# The bytes in GPT-2's order, and a few merges: "he", "the", " the", "at", " c" ...
MERGES = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("a", "t"), ("Ġ", "c"), ("Ġc", "at"), ("o", "w")]
WORDS = [*CHARACTER_TO_BYTE, *("".join(merge) for merge in MERGES)]
VOCABULARY = {entry: token for token, entry in enumerate(WORDS)}
END = len(VOCABULARY)

TEXTS = (
    "",
    "the cat",
    "<|endoftext|>",
    "the <|ask|> cat<|say|>  at\n<|endoftext|>",
    "<|ask|><|ask|>the\n\n<|say|> \t the [PAD]cat",
    "1234 567's <|ask|>890",
    "x<|say|>y [pad] [PAD] <|note|> <|end of turn|>é\u3000",
)


def token(content: str, id: int, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens` as `tokenizers` writes it."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    given = {"id": id, "content": content, "special": special, "normalized": not special}
    return given | plain | flags


def tokenizer_json(*added: dict[str, Any], prefix_space: bool = False, **parts: Any) -> dict:
    """A tokenizer.json with these added tokens."""
    step = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": step | {"add_prefix_space": prefix_space},
        "post_processor": step | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": step | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": VOCABULARY,
            "merges": [" ".join(merge) for merge in MERGES],
        },
    } | parts


EOT = token("<|endoftext|>", END)
ASK, SAY = token("<|ask|>", END + 1), token("<|say|>", END + 2)
LEGACY = {
    "vocab.json": VOCABULARY | {"<|endoftext|>": END},
    "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]),
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
_FLAGS = {k: v for k, v in token("<|say|>", 0, lstrip=True).items() if k != "id"}

FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {"tokenizer.json": tokenizer_json(EOT)},
    "added": {"tokenizer.json": tokenizer_json(EOT, ASK, SAY)},
    "not special": {
        "tokenizer.json": tokenizer_json(EOT, ASK, token("<|say|>", END + 2, special=False))
    },
    "strips": {
        "tokenizer.json": tokenizer_json(
            EOT, ASK | {"lstrip": True}, SAY | {"rstrip": True, "single_word": True}
        ),
        "tokenizer_config.json": FAST,
    },
    "a gap in the ids": {"tokenizer.json": tokenizer_json(EOT, ASK, token("[PAD]", END + 40))},
    "named in its config": {
        "tokenizer.json": tokenizer_json(EOT, ASK),
        "tokenizer_config.json": {"pad_token": "[PAD]", "eos_token": "<|ask|>"},
    },
    "named in its config, another class": {
        "tokenizer.json": tokenizer_json(EOT, ASK),
        "tokenizer_config.json": FAST | {"pad_token": "[PAD]", "eos_token": "<|ask|>"},
    },
    "named in the map": {
        "tokenizer.json": tokenizer_json(EOT, SAY | {"id": END + 1}),
        "special_tokens_map.json": {
            "pad_token": "[PAD]",
            "eos_token": {"content": "<|say|>", **dict.fromkeys(("lstrip", "rstrip"), False)},
        },
    },
    "listed in its config": {
        "tokenizer.json": tokenizer_json(EOT),
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(END): {k: v for k, v in EOT.items() if k != "id"},
                str(END + 1): _FLAGS,
            },
        },
    },
    "listed with other flags": {
        "tokenizer.json": tokenizer_json(EOT, SAY | {"id": END + 1}),
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(END): {k: v for k, v in EOT.items() if k != "id"},
                str(END + 1): _FLAGS,
            },
        },
    },
    "more specials": {
        "tokenizer.json": tokenizer_json(EOT),
        "tokenizer_config.json": {
            "additional_special_tokens": ["<|ask|>", "<|end of turn|>"],
            "note_token": "<|note|>",
        },
    },
    "beside it": {
        "tokenizer.json": tokenizer_json(EOT),
        "added_tokens.json": {"<|say|>": END + 1},
    },
    "no end of text": {
        "tokenizer.json": tokenizer_json(ASK | {"id": END}),
        "tokenizer_config.json": FAST | {"eos_token": "<|ask|>"},
    },
    "prefix space of the class": {
        "tokenizer.json": tokenizer_json(EOT, ASK),
        "tokenizer_config.json": {"add_prefix_space": True},
    },
    "prefix space of the file": {
        "tokenizer.json": tokenizer_json(EOT, ASK, prefix_space=True),
        "tokenizer_config.json": FAST,
    },
    "prefix space that the class ignores": {
        "tokenizer.json": tokenizer_json(EOT, ASK, prefix_space=True)
    },
    "bos that has no effect": {
        "tokenizer.json": tokenizer_json(EOT, ASK),
        "tokenizer_config.json": {"add_bos_token": True, "bos_token": "<|endoftext|>"},
    },
    "a template of nothing": {
        "tokenizer.json": tokenizer_json(
            EOT,
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {},
            },
        )
    },
    "steps that the class ignores": {
        "tokenizer.json": tokenizer_json(
            EOT, ASK, normalizer={"type": "NFC"}, pre_tokenizer=DIGITS_APART
        ),
        "tokenizer_config.json": {"tokenizer_class": "CodeGenTokenizerFast"},
    },
    "steps of the file": {
        "tokenizer.json": tokenizer_json(EOT, ASK, pre_tokenizer=DIGITS_APART),
        "tokenizer_config.json": FAST,
    },
    "a class of nobody": {
        "tokenizer.json": tokenizer_json(EOT, ASK, pre_tokenizer=DIGITS_APART),
        "tokenizer_config.json": {"tokenizer_class": "NobodysTokenizer"},
    },
    "a class of null": {
        "tokenizer.json": tokenizer_json(EOT, ASK, pre_tokenizer=DIGITS_APART),
        "tokenizer_config.json": {"tokenizer_class": None},
    },
    "padding that names its token": {
        "tokenizer.json": tokenizer_json(
            EOT,
            token("[PAD]", END + 1),
            padding={
                "strategy": "BatchLongest",
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": END + 1,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            },
        ),
        "tokenizer_config.json": FAST,
    },
    "named twice, with other flags": {
        "tokenizer.json": tokenizer_json(EOT),
        "special_tokens_map.json": {
            "unk_token": "<|say|>",
            "pad_token": {"content": "<|say|>", "lstrip": True, "rstrip": False},
        },
    },
    "more specials as objects": {
        "tokenizer.json": tokenizer_json(EOT),
        "tokenizer_config.json": {
            "note_token": {"__type": "AddedToken", "content": "<|note|>", "rstrip": True}
        },
    },
    "nothing special in texts": {
        "tokenizer.json": tokenizer_json(EOT, ASK),
        "tokenizer_config.json": {"split_special_tokens": True},
    },
    "no eos": {
        "tokenizer.json": tokenizer_json(EOT, ASK),
        "tokenizer_config.json": dict.fromkeys(("bos_token", "eos_token", "unk_token")),
    },
    "two files of old": LEGACY,
    "two files of old, with more": LEGACY
    | {
        "added_tokens.json": {"<|ask|>": END + 1, "[PAD]": END + 2},
        "special_tokens_map.json": {"pad_token": "[PAD]", "eos_token": "<|ask|>"},
    },
    "two files of old, prefix space": LEGACY
    | {"tokenizer_config.json": {"add_prefix_space": True}},
    "two files of old, without the end": LEGACY | {"vocab.json": VOCABULARY},
}
"""File by file, what lies in a folder; each loads in transformers."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a normaliser": (
        {
            "tokenizer.json": tokenizer_json(EOT, normalizer={"type": "NFC"}),
            "tokenizer_config.json": FAST,
        },
        "normaliser",
    ),
    "a template with a bos": (
        {
            "tokenizer.json": tokenizer_json(
                EOT,
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 1}},
                    ],
                    "special_tokens": {
                        "<|endoftext|>": {
                            "id": "<|endoftext|>",
                            "ids": [END],
                            "tokens": ["<|endoftext|>"],
                        }
                    },
                },
            )
        },
        "post_processor adds tokens to every text",
    ),
    "a class of another model": (
        {
            "tokenizer.json": tokenizer_json(EOT, pre_tokenizer=DIGITS_APART),
            "tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizerFast"},
        },
        "tokenizer_class is GPTNeoXTokenizer",
    ),
    "a bos of the class": (
        LEGACY | {"tokenizer_config.json": {"add_bos_token": True}},
        "add_bos_token",
    ),
}
"""What transformers loads and MeshLM refuses, and what its line says."""


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    """Writes the files and a config.json of a GPT-J into a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gptj"}))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
