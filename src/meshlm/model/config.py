"""The sizes and the architecture of a model."""

import dataclasses
from typing import Literal, get_args

from meshlm.core.errors import UsageError

Bias = Literal["embedding", "qkv", "attention_out", "feed_forward", "head"]
"""Of every embedding; of query, key and value; of the output of attention; of both products of the
feed-forward; of the logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and architecture of a model: everything that decides its parameters and numbers.

    The fields after the sizes describe the architecture. `families.py` has a constructor for each
    architecture that is supported, and refuses the others.
    """

    num_layers: int
    """Blocks of attention and feed-forward."""
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
    """Leading dims of each head that are rotated, in interleaved pairs: even, at most head_dim. 0
    where positions are learned."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every layer norm."""
    rotary_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    positions: Literal["rotary", "learned"]
    """Queries and keys are rotated, or a row of a learned table is added to each embedding."""
    residual: Literal["parallel", "serial"]
    """parallel: attention and feed-forward read the block's input; serial: the feed-forward reads
    the input plus the output of attention."""
    norms: Literal["shared", "separate"]
    """One norm a block, or one for attention and one for the feed-forward."""
    windows: tuple[int | None, ...]
    """Attention window of layer i in tokens, `windows[i % len(windows)]`, the query's own position
    included; None: full causal attention."""
    attention_scale: float | None
    """Factor of the attention scores; None: 1/sqrt(head_dim)."""
    attention_scale_by_layer: bool
    """Attention scores of layer i are divided by i + 1."""
    activation: Literal["gelu_tanh", "gelu"]
    """The GELU in its tanh approximation, or the exact one."""
    biases: tuple[Bias, ...]
    """Which biases there are, in the order of `Bias`."""
    tied_head: bool
    """The head is the embedding's table."""

    def __post_init__(self) -> None:
        for name in (*_SIZES, *(("rotary_dim",) if self.positions == "rotary" else ())):
            value = getattr(self, name)
            if not value > 0:
                raise UsageError(f"{name} is {value}: give a positive number")
        if self.positions == "learned" and self.rotary_dim != 0:
            raise UsageError(f"rotary_dim is {self.rotary_dim}: give 0 where positions are learned")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UsageError(
                f"rotary_dim is {self.rotary_dim}: give an even number of at most "
                f"head_dim ({self.head_dim})"
            )
        in_order = tuple(name for name in get_args(Bias) if name in self.biases)
        if self.biases != in_order:
            raise UsageError(f"biases is {list(self.biases)}: give some of {list(get_args(Bias))}")

    def has_bias(self, name: Bias) -> bool:
        """Returns whether the model has this bias."""
        return name in self.biases


_SIZES = (
    *("num_layers", "d_model", "num_heads", "head_dim", "d_ff", "vocab_size", "context_length"),
    *("layer_norm_epsilon", "rotary_base"),
)
