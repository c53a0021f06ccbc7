"""GPT-J once more, in float64 numpy, written from the paper and the published facts alone.

An oracle: one loop a token where that is plainest, complex numbers for the rotation, no JAX.
"""

from __future__ import annotations

import numpy as np

from meshlm.core.tree import to_named
from meshlm.model.config import ModelConfig
from meshlm.model.params import Params


def layer_norm(x, scale, offset, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + offset


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x, positions, rotary_dim, base=10_000.0):
    """x [..., T, N, H] with dims (2i, 2i+1) of the first `rotary_dim` turned as complex numbers."""
    pairs = x[..., 0:rotary_dim:2] + 1j * x[..., 1:rotary_dim:2]
    frequencies = np.array([base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])
    turned = pairs * np.exp(1j * np.multiply.outer(positions, frequencies))[..., :, None, :]
    out = np.array(x, np.float64)
    out[..., 0:rotary_dim:2], out[..., 1:rotary_dim:2] = turned.real, turned.imag
    return out


def attend(q, k, v, seen):
    """Softmax attention, head by head and query by query; `seen` [B, T, S]."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, t])
        scores = k[b, keys, n] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, keys, n]
    return out


def causal(batch, length, segments=None):
    seen = np.tril(np.ones((length, length), bool))[None].repeat(batch, 0)
    if segments is not None:
        segments = np.asarray(segments)
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    return seen


def forward(params: Params, config: ModelConfig, tokens, segments=None):
    """Logits [B, T, V] for parameters stacked by layer."""
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    seen, positions = causal(batch, length, segments), np.arange(length)
    x = np.asarray(params.embedding.tokens, np.float64)[tokens]
    if params.embedding.bias is not None:
        x = x + np.asarray(params.embedding.bias, np.float64)
    epsilon = config.layer_norm_epsilon
    for layer in range(config.num_layers):
        w = {
            name: np.asarray(value, np.float64)[layer]
            for name, value in to_named(params.blocks).items()
        }
        normed = layer_norm(x, w["attention_norm.scale"], w["attention_norm.offset"], epsilon)
        q, k, v = (
            np.einsum("btd,nhd->btnh", normed, w[f"attention.{name}.weight"])
            for name in ("query", "key", "value")
        )
        q, k = (rotate(a, positions, config.rotary_dim, config.rotary_base) for a in (q, k))
        mixed = np.einsum("btnh,dnh->btd", attend(q, k, v, seen), w["attention.out.weight"])
        hidden = normed @ w["feed_forward.up.weight"].T + w["feed_forward.up.bias"]
        down, bias = w["feed_forward.down.weight"], w["feed_forward.down.bias"]
        x = x + mixed + gelu_new(hidden) @ down.T + bias
    norm, head = to_named(params.final_norm), to_named(params.head)
    scale, offset = (np.asarray(norm[name], np.float64) for name in ("scale", "offset"))
    weight, bias = (np.asarray(head[name], np.float64) for name in ("weight", "bias"))
    return layer_norm(x, scale, offset, epsilon) @ weight.T + bias


def token_loss(logits, targets):
    """(nll, z) of every token; z is the squared log-sum-exp relative to the largest logit."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1)
    log_sum = np.log(np.exp(logits - top[..., None]).sum(-1))
    label = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return log_sum + top - label, log_sum**2
