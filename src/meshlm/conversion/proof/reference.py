"""GPT-J's forward pass once more, in float32 numpy, from the files' own tensors.

It shares nothing with what it checks: no code with `model/`, and no table of names with the modules
that read and write the formats. The original's shards are computed one by one, as the original
does: each adds its part of a sum and its own bias, and the norms are those of shard 0.

Dim letters: T time, D model, N heads (of a shard), H head dim, V vocabulary rows, R rotary dims,
K contracted.

Source: mesh-transformer-jax layers.py:18-36, 128-148, 185-313, 545-567; transformers' GPT-J.
"""

from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from meshlm.conversion.source import Kind, Part
from meshlm.formats.tensor import row_blocks
from meshlm.model.config import ModelConfig

# Of a weight, so many numbers are cast to float32 at a time.
_BLOCK_NUMBERS = 16 << 20
_MASKED = np.float32(-1e10)

_HF_LAYER = {
    "scale": "ln_1.weight",
    "offset": "ln_1.bias",
    "query": "attn.q_proj.weight",
    "key": "attn.k_proj.weight",
    "value": "attn.v_proj.weight",
    "out": "attn.out_proj.weight",
    "ff_in": "mlp.fc_in.weight",
    "ff_in_bias": "mlp.fc_in.bias",
    "ff_out": "mlp.fc_out.weight",
    "ff_out_bias": "mlp.fc_out.bias",
}
_HF_HEAD = {
    "scale": "transformer.ln_f.weight",
    "offset": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
}
_MTJ_LAYER = {
    "scale": "replicated_layer_norm/scale",
    "offset": "replicated_layer_norm/offset",
    "query": "linear/w",
    "value": "linear_1/w",
    "key": "linear_2/w",
    "out": "linear_3/w",
    "ff_in": "linear_4/w",
    "ff_in_bias": "linear_4/b",
    "ff_out": "linear_5/w",
    "ff_out_bias": "linear_5/b",
}
_MTJ_HEAD = {
    "scale": "replicated_layer_norm/scale",
    "offset": "replicated_layer_norm/offset",
    "head": "linear/w",
    "head_bias": "linear/b",
}
_OWN_LAYER = {
    "scale": "attention_norm.scale",
    "offset": "attention_norm.offset",
    "query": "attention.query.weight",
    "key": "attention.key.weight",
    "value": "attention.value.weight",
    "out": "attention.out.weight",
    "ff_in": "feed_forward.up.weight",
    "ff_in_bias": "feed_forward.up.bias",
    "ff_out": "feed_forward.down.weight",
    "ff_out_bias": "feed_forward.down.bias",
}
_OWN_HEAD = {
    "scale": "final_norm.scale",
    "offset": "final_norm.offset",
    "head": "head.weight",
    "head_bias": "head.bias",
}


class ReferenceForward:
    """Takes the parts of a model in the order of the forward pass, and ends with its logits."""

    def __init__(self, model: ModelConfig, kind: Kind, tokens: Sequence[int]) -> None:
        self._model, self._kind = model, kind
        self._tokens = np.asarray(tokens)
        self._sin, self._cos = _rotary_table(model, len(self._tokens))
        self._x = np.zeros((0, 0), np.float32)
        self.logits = np.zeros((0, 0), np.float32)
        """Float32 [T, V], once all parts were fed."""

    def feed(self, part: Part) -> None:
        """Computes one part: the embedding, the next layer, or the head."""
        if part.key == "embedding":
            self._x = self._embed(part)
        elif part.key == "head":
            self.logits = self._head(part)
        else:
            self._x = self._x + self._layer(part)

    def _embed(self, part: Part) -> np.ndarray:
        if self._kind == "hf":
            return _floats(part.read_raw("transformer.wte.weight")[self._tokens])
        if self._kind == "meshlm":
            x = _floats(part.read_raw("embedding.tokens")[self._tokens])
            has_bias = "embedding.bias" in part.raw
            return x + _floats(part.read_raw("embedding.bias")) if has_bias else x
        total, start = np.zeros((len(self._tokens), self._model.d_model), np.float32), 0
        for shard in range(_num_shards(part)):
            module = f"shard_{shard}/embedding_shard/linear"
            table = part.read_raw(f"{module}/w")
            own = (self._tokens >= start) & (self._tokens < start + len(table))
            total[own] += _floats(table[self._tokens[own] - start])
            total += _floats(part.read_raw(f"{module}/b"))
            start += len(table)
        return total

    def _layer(self, part: Part) -> np.ndarray:
        get = self._getter(part)
        normed = self._norm(self._x, get(0, "scale"), get(0, "offset"))
        update = np.zeros_like(self._x)
        for shard in range(_num_shards(part)):
            q, k, v = (
                self._heads(self._product(normed, _rows(get(shard, role))))
                for role in ("query", "key", "value")
            )
            mixed = _attend(self._rotate(q), self._rotate(k), v)
            update += self._product(mixed, _columns(get(shard, "out")))
            hidden = self._product(normed, get(shard, "ff_in")) + _floats(get(shard, "ff_in_bias"))
            update += self._product(_gelu(hidden), get(shard, "ff_out"))
            update += _floats(get(shard, "ff_out_bias"))
        return update

    def _head(self, part: Part) -> np.ndarray:
        get = self._getter(part)
        normed = self._norm(self._x, get(0, "scale"), get(0, "offset"))
        pieces = [
            self._product(normed, get(shard, "head")) + _floats(get(shard, "head_bias"))
            for shard in range(_num_shards(part))
        ]
        return np.concatenate(pieces, axis=1)

    def _getter(self, part: Part) -> Callable[[int, str], np.ndarray]:
        """Returns what reads the tensor of a role in a shard."""
        is_head = part.key == "head"

        def get(shard: int, role: str) -> np.ndarray:
            if self._kind == "mtj":
                module = "projection_shard" if is_head else f"layer_{part.key}"
                leaf = (_MTJ_HEAD if is_head else _MTJ_LAYER)[role]
                name = f"shard_{shard}/{module}/{leaf}"
            elif self._kind == "hf":
                name = _HF_HEAD[role] if is_head else f"transformer.h.{part.key}.{_HF_LAYER[role]}"
            else:
                name = _OWN_HEAD[role] if is_head else f"blocks.{part.key}.{_OWN_LAYER[role]}"
            return part.read_raw(name)

        return get

    def _product(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Returns x [T, K] times a weight: [K, out] in the original's files, else [out, K]."""
        pieces = (x @ w for w in _blocks(weight if self._kind == "mtj" else weight.T))
        return np.concatenate(list(pieces), axis=1)

    def _norm(self, x: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        epsilon = np.float32(self._model.layer_norm_epsilon)
        return centred / np.sqrt(variance + epsilon) * _floats(scale) + _floats(offset)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        """Returns [N, T, H] of [T, N x H]."""
        return x.reshape(len(x), -1, self._model.head_dim).transpose(1, 0, 2)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """Returns x [N, T, H] with pairs (0, 1), (2, 3), ... of its first R dims turned."""
        dims = self._model.rotary_dim
        even, odd = x[..., 0:dims:2], x[..., 1:dims:2]
        turned = x.copy()
        turned[..., 0:dims:2] = even * self._cos - odd * self._sin
        turned[..., 1:dims:2] = odd * self._cos + even * self._sin
        return turned


def _rotary_table(model: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sin, cos) [T, R/2], computed in float64 and rounded once."""
    pairs = np.arange(model.rotary_dim // 2, dtype=np.float64)
    frequencies = float(model.rotary_base) ** (-2.0 * pairs / model.rotary_dim)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns causal attention [T, N x H] of [N, T, H]."""
    length = q.shape[1]
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(q.shape[-1]))
    scores = np.where(np.tri(length, dtype=bool), scores, _MASKED)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return mixed.transpose(1, 0, 2).reshape(length, -1)


def _gelu(x: np.ndarray) -> np.ndarray:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def _num_shards(part: Part) -> int:
    shards = {name.split("/")[0] for name in part.raw if name.startswith("shard_")}
    return max(1, len(shards))


def _rows(weight: np.ndarray) -> np.ndarray:
    """Returns [N x H, D] of [N, H, D]; a matrix as it is."""
    return weight.reshape(-1, weight.shape[-1])


def _columns(weight: np.ndarray) -> np.ndarray:
    """Returns [D, N x H] of [D, N, H]; a matrix as it is."""
    return weight.reshape(len(weight), -1)


def _blocks(weight: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the columns of a matrix [K, out] in float32, some at a time."""
    for columns in row_blocks(weight.T.shape, _BLOCK_NUMBERS):
        yield _floats(weight[:, columns])


def _floats(array: np.ndarray) -> np.ndarray:
    """Returns float32; two bytes without a name are bfloat16, as the original stores it."""
    if array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        array = array.view(ml_dtypes.bfloat16)
    return array.astype(np.float32, copy=False)
