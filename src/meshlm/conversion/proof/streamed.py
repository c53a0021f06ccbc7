"""MeshLM's own forward pass over a model that is larger than memory: a part at a time.

It is the code of `model/transformer.py`, on the CPU and in float32. The certificate holds it
against the reference.

Dim letters: T time, V vocabulary rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshlm.conversion.source import Part
from meshlm.core.tree import from_named, map_named
from meshlm.formats.tensor import row_blocks
from meshlm.model import transformer
from meshlm.model.config import ModelConfig
from meshlm.model.params import weight_tree
from meshlm.model.transformer import Compute

_TABLE, _HEAD = "embedding.tokens", "head.weight"
_BLOCK_NUMBERS = 16 << 20
_FLOAT32 = Compute(dtype="float32")


class StreamedForward:
    """Takes the parts of a model in the order of the forward pass, and ends with its logits."""

    def __init__(self, model: ModelConfig, tokens: Sequence[int]) -> None:
        self._model, self._tokens = model, np.asarray(tokens, np.int32)
        self._device = jax.local_devices(backend="cpu")[0]
        with jax.default_device(self._device):
            self._rotary = transformer.rotary_rows(model, _FLOAT32, None, len(tokens))
        self._x: jax.Array | None = None
        self.logits = np.zeros((0, 0), np.float32)
        """Float32 [T, V], once all parts were fed."""

    def feed(self, part: Part) -> None:
        """Computes one part: the embedding, the next layer, or the head."""
        with jax.default_device(self._device):
            if part.key == "embedding":
                self._x = self._embed(part)
            elif part.key == "head":
                self.logits = self._head(part)
            else:
                self._x = self._layer(part)

    def _embed(self, part: Part) -> jax.Array:
        """Looks up in a table of the rows that are needed, and no others."""
        named = {name: part.read(name) for name in part.tensors if name != _TABLE}
        named[_TABLE] = np.ascontiguousarray(part.read(_TABLE)[self._tokens])
        own = jnp.arange(len(self._tokens), dtype=jnp.int32)[None]
        return transformer.embed(self._weights("embedding", named), own, _FLOAT32)

    def _layer(self, part: Part) -> jax.Array:
        prefix = f"blocks.{part.key}."
        named = {}
        # The largest first: while one is cast it is there twice.
        for name in sorted(part.tensors, key=lambda n: -math.prod(part.tensors[n].shape)):
            stored = jnp.asarray(part.read(name))
            named[name.removeprefix(prefix)] = stored.astype(jnp.float32).block_until_ready()
        assert self._x is not None
        block = from_named(weight_tree(self._model).blocks, named)
        x, _ = transformer.block_forward(self._x, block, self._model, _FLOAT32, self._rotary)
        return x.block_until_ready()

    def _head(self, part: Part) -> np.ndarray:
        named = {name: part.read(name) for name in part.tensors}
        assert self._x is not None
        norm = self._weights("final_norm", named)
        x = transformer.final_norm(norm, self._model, _FLOAT32, self._x)
        pieces = []
        for rows in row_blocks(named[_HEAD].shape, _BLOCK_NUMBERS):
            head = self._weights("head", {name: array[rows] for name, array in named.items()})
            # The kernels that unstacked weights take: those of decoding.
            logits = transformer.head_logits(head, x, _FLOAT32, streamed=True)
            pieces.append(np.asarray(logits)[0])
        return np.concatenate(pieces, axis=1)

    def _weights(self, field: str, named: Mapping[str, np.ndarray]) -> Any:
        """Returns a field of `Params` with its leaves from tensors by native name."""
        like = getattr(weight_tree(self._model), field)
        return map_named(lambda name, _: jnp.asarray(named[f"{field}.{name}"]), like)
