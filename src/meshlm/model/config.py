"""The shape of a model, and the named shapes."""

import dataclasses
import difflib

from meshlm.core.errors import UsageError

GPT2_VOCAB_SIZE = 50_257
GPTJ_VOCAB_ROWS = 50_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT-J: everything that decides the parameters and the numbers."""

    num_layers: int
    """Blocks, each attention and feed-forward in parallel."""
    d_model: int
    """Width of the residual stream."""
    num_heads: int
    """Attention heads."""
    head_dim: int
    """Width of one head."""
    d_ff: int
    """Width of the feed-forward."""
    vocab_size: int
    """Rows of the embedding and of the head, padding included."""
    context_length: int
    """The longest sequence, in tokens."""
    rotary_dim: int
    """Leading dims of each head that are rotated; even, at most head_dim."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every layer norm."""
    rotary_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    embedding_bias: bool = False
    """A vector is added to every embedding, as in the original's own checkpoints."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not bool and not value > 0:
                raise UsageError(f"{field.name} is {value}: give a positive number")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UsageError(
                f"rotary_dim is {self.rotary_dim}: give an even number of at most "
                f"head_dim ({self.head_dim})"
            )


def _preset(
    num_layers: int, d_model: int, num_heads: int, rotary_dim: int, context_length: int
) -> ModelConfig:
    return ModelConfig(
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
    """Returns the preset's name for a shape, whatever its vocabulary, or `custom`."""
    for name, preset in PRESETS.items():
        if preset == dataclasses.replace(
            model, vocab_size=preset.vocab_size, embedding_bias=preset.embedding_bias
        ):
            return name
    return "custom"
