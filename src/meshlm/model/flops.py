"""The arithmetic of a model: its floating-point operations, counted by formula."""

from meshlm.model.config import ModelConfig
from meshlm.model.params import weight_table


def matmul_params(model: ModelConfig) -> int:
    """Returns the number of weights that every token is multiplied with."""
    return sum(w.size for w in weight_table(model).values() if "product" in w.uses)


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token: 6 P + 6 L T N H, forward and backward.

    P is `matmul_params`: 2 FLOPs a weight forward, 4 backward. Causal attention at T = `seq_len`
    sees T / 2 keys on average: q k^T and its product with v cost 2 T N H a layer forward, and
    twice that backward. Recomputation (remat), the embedding's lookup, norms and softmax are not
    counted, so that the figure is the model's and not the implementation's.

    Source: PaLM (Chowdhery et al., 2022), appendix B, with its attention term halved for causality.
    """
    attention = 6.0 * model.num_layers * seq_len * model.num_heads * model.head_dim
    return 6.0 * matmul_params(model) + attention


def mfu(
    tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float | None
) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None where the hardware's peak is not known.

    `peak_flops_per_s` is the sum over all devices that did the `tokens_per_s`.
    """
    return tokens_per_s * flops_per_token / peak_flops_per_s if peak_flops_per_s else None
