"""The named models, and the rows of a vocabulary."""

import dataclasses
import difflib

from meshlm.core.errors import UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j, with_embedding_bias

GPT2_VOCAB_SIZE = 50_257
GPTJ_VOCAB_ROWS = 50_400


def _preset(
    num_layers: int, d_model: int, num_heads: int, rotary_dim: int, context_length: int
) -> ModelConfig:
    return gpt_j(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=4 * d_model,
        vocab_size=GPTJ_VOCAB_ROWS,
        context_length=context_length,
        rotary_dim=rotary_dim,
    )


# `gpt-j-6b` is the published model; the vocabulary of the others follows the data's tokenizer.
PRESETS: dict[str, ModelConfig] = {
    "test": _preset(2, 64, 8, 4, 128),
    "demo": _preset(6, 256, 8, 16, 512),
    "125m": _preset(12, 768, 12, 32, 2048),
    "350m": _preset(24, 1024, 16, 32, 2048),
    "1.3b": _preset(24, 2048, 16, 64, 2048),
    "2.7b": _preset(32, 2560, 20, 64, 2048),
    "gpt-j-6b": _preset(28, 4096, 16, 64, 2048),
    "23b": _preset(28, 8192, 32, 64, 2048),
}


def vocab_rows(tokenizer_size: int) -> int:
    """Returns the rows for a tokenizer of this size: a multiple of 128, or GPT-J's for GPT-2's."""
    if tokenizer_size == GPT2_VOCAB_SIZE:
        return GPTJ_VOCAB_ROWS
    return -(-tokenizer_size // 128) * 128


def find_preset(name: str) -> ModelConfig:
    """Returns the preset of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"--preset {name}: {hint}choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def name_of(model: ModelConfig) -> str:
    """Returns the preset's name for a model, whatever its vocabulary, or `custom`."""
    plain = with_embedding_bias(model, False)
    for name, preset in PRESETS.items():
        if preset == dataclasses.replace(plain, vocab_size=preset.vocab_size):
            return name
    return "custom"
