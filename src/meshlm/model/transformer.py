"""The transformer: GPT-J's parallel block, and the forward pass with and without a cache.

Dim letters: B batch, T query time, S key time, D model, N heads, H head dim, F feed-forward,
V vocabulary rows, L layers.

The residual stream, the norms and the softmax are float32; products take operands of
`Compute.dtype` and sum in float32. `Compute.rounded` rounds the residual stream to `Compute.dtype`
after each operation, as transformers does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from meshlm.core.sharding import reshard, share
from meshlm.model.cache import Cache, LayerCache, cache_mask, extend
from meshlm.model.compute import Compute, Remat, rounded, rounded_gelu
from meshlm.model.config import ModelConfig
from meshlm.model.params import Block, Embedding, Linear, Norm, Params
from meshlm.ops.attention import attend_to_cache
from meshlm.ops.fast_attention import MIXED, attend_causally
from meshlm.ops.linear import add_bias, dots, layer_norm, lookup, operand
from meshlm.ops.loss import head_loss
from meshlm.ops.rotary import apply_rotary, rotary_table, table_rows
from meshlm.ops.weights import Matrix, as_matrix

# Query, key and value; the feed-forward's first product.
_PROJECTION, _HIDDEN = "projection", "hidden"
# What of a layer, besides its input, is not computed again in the backward pass.
_KEPT: dict[Remat, tuple[str, ...]] = {
    "minimal": (_PROJECTION, _HIDDEN, MIXED),
    "feed-forward": (_HIDDEN,),
    "full": (),
}


class Cached(NamedTuple):
    """What a layer is given when it goes on from earlier tokens."""

    layer: LayerCache
    start_B: jax.Array
    """The place of each row's first new token."""
    mask_BNTS: jax.Array
    """Which places each new token sees."""


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    compute: Compute,
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Returns the float32 output of the final norm for whole sequences from position 0."""
    rotary = rotary_rows(config, compute, None, tokens_BT.shape[1])

    def layer(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
        return block_forward(x_BTD, block, config, compute, rotary, segment_ids_BT)[0], None

    layer = _rematerialise(layer, compute.remat)
    assert isinstance(params.blocks, Block)
    x_BTD = embed(params.embedding, tokens_BT, compute)
    if compute.scan_layers:
        x_BTD, _ = jax.lax.scan(layer, x_BTD, params.blocks)
    else:
        for i in range(config.num_layers):
            x_BTD, _ = layer(x_BTD, jax.tree.map(lambda w, i=i: w[i], params.blocks))
    return final_norm(params.final_norm, config, compute, x_BTD)


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    compute: Compute,
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Returns float32 logits for whole sequences from position 0."""
    x_BTD = hidden_states(params, config, tokens_BT, compute, segment_ids_BT)
    return unembed(params, x_BTD, compute)


def forward_cached(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
    compute: Compute,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns the final norm's output for new tokens, and the cache with their keys and values.

    Args:
        params: with one block per layer (`unstack_blocks`).
        tokens_BT: the new tokens; each row writes T consecutive places of its cache.
        positions_BT: their positions, consecutive along T.
        cache: what came before. Places at or after a row's positions are overwritten or unseen.
    """
    rotary = rotary_rows(config, compute, positions_BT, tokens_BT.shape[1])
    mask = cache_mask(cache, positions_BT)
    assert isinstance(params.blocks, tuple)
    x_BTD = embed(params.embedding, tokens_BT, compute)
    start_B = reshard(positions_BT[:, 0], "batch")
    layers = []
    for block, layer_cache in zip(params.blocks, cache.layers, strict=True):
        x_BTD, updated = block_forward(
            x_BTD,
            block,
            config,
            compute,
            rotary,
            cached=Cached(layer_cache, start_B, mask),
        )
        layers.append(updated)
    return final_norm(params.final_norm, config, compute, x_BTD), Cache(layers=tuple(layers))


def embed(
    embedding: Embedding, tokens_BT: Int[Array, "B T"], compute: Compute
) -> Float[Array, "B T D"]:
    """Returns the float32 embedding of each token."""
    with jax.named_scope("embed"):
        return rounded(_plus(lookup(embedding.tokens, tokens_BT), embedding.bias), compute)


def unembed(
    params: Params, x_BTD: Float[Array, "B T D"], compute: Compute
) -> Float[Array, "B T V"]:
    """Returns float32 logits; with a `model` axis they are split by vocabulary."""
    # Unstacked blocks mean decoding.
    return head_logits(params.head, x_BTD, compute, streamed=isinstance(params.blocks, tuple))


def head_logits(
    head: Linear, x_BTD: Float[Array, "B T D"], compute: Compute, *, streamed: bool
) -> Float[Array, "B T V"]:
    """Returns float32 logits of the rows of a head.

    Args:
        streamed: as `dots`.
    """
    with jax.named_scope("head"):
        weight = gather(head.weight, compute, "vocab", "embed")
        (logits_BTV,) = dots([(x_BTD, weight, 1)], streamed=streamed)
        if head.bias is not None:
            logits_BTV = logits_BTV + head.bias[None, None].astype(jnp.float32)
        return rounded(logits_BTV, compute)


def summed_loss(
    params: Params,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    compute: Compute,
    z_loss: float,
) -> Float[Array, ""]:
    """Returns the loss summed over the tokens where the mask is 1, in nats, from hidden states."""
    with jax.named_scope("head_loss"):
        head = gather(params.head.weight, compute, "vocab", "embed")
        bias = params.head.bias
        if bias is None:
            bias = reshard(jnp.zeros(head.shape[0]), "vocab")
        # The products' type again in each of them; in this one their gradients are added up.
        head_VD = head.to_array(compute.reduce_dtype)
        bias = bias.astype(jnp.float32)
        return head_loss(x_BTD.astype(compute.dtype), head_VD, bias, targets_BT, mask_BT, z_loss)


def gather(weight: jax.Array | Matrix, compute: Compute, *dims: str | None) -> Matrix:
    """Returns a weight as a product takes it: in the compute dtype, gathered over `data`."""
    reduced = compute.reduce_dtype == compute.dtype
    return as_matrix(weight).gathered(*dims, dtype=compute.dtype, reduced=reduced)


@jax.named_scope("block")
def block_forward(
    x_BTD: jax.Array,
    block: Block,
    config: ModelConfig,
    compute: Compute,
    rotary: tuple[jax.Array, jax.Array],
    segment_ids_BT: jax.Array | None = None,
    cached: Cached | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """Returns x + attention(norm(x)) + feed_forward(norm(x)), and the cache if one is given.

    A single layer norm, and a single all-reduce over the mesh axis `model`.
    """
    decoding = cached is not None
    normed = apply_norm(block.attention_norm, x_BTD, config)
    weights = _read_weights(block, compute)
    normed = share(operand(normed, weights), "heads")
    *qkv_BTNH, hidden_BTF = dots([(normed, weight, 1) for weight in weights], streamed=decoding)
    mixed_BTNH, cache = _attention(qkv_BTNH, compute, rotary, segment_ids_BT, cached)
    hidden_BTF = _activate(hidden_BTF, block.feed_forward.up.bias, compute)
    out = gather(block.attention.out.weight, compute, "embed", "heads", None)
    down = gather(block.feed_forward.down.weight, compute, "embed", "ff")
    attention, feed_forward = dots(
        [(mixed_BTNH, out, 2), (hidden_BTF, down, 1)],
        partial=True,
        streamed=decoding,
    )
    bias = block.feed_forward.down.bias
    if compute.rounded:
        return _add_rounded(x_BTD, attention, feed_forward, bias, compute), cache
    update = reshard(attention + feed_forward, "batch", None, None)
    return x_BTD + _plus(update, bias), cache


def _read_weights(block: Block, compute: Compute) -> list[Matrix]:
    """Returns the weights that read the residual stream: of query, key, value, feed-forward."""
    qkv = [
        gather(weight, compute, "heads", None, "embed")
        for weight in (
            block.attention.query.weight,
            block.attention.key.weight,
            block.attention.value.weight,
        )
    ]
    return [*qkv, gather(block.feed_forward.up.weight, compute, "ff", "embed")]


def _add_rounded(
    x_BTD: jax.Array,
    attention: jax.Array,
    feed_forward: jax.Array,
    bias: jax.Array | None,
    compute: Compute,
) -> jax.Array:
    """Returns the sum in transformers' order, every step of it rounded."""
    attention, feed_forward = (
        reshard(part, "batch", None, None) for part in (attention, feed_forward)
    )
    feed_forward = rounded(_plus(feed_forward, bias), compute)
    update = rounded(rounded(attention, compute) + feed_forward, compute)
    return rounded(update + x_BTD, compute)


def _attention(
    qkv_BTNH: list[jax.Array],
    compute: Compute,
    rotary: tuple[jax.Array, jax.Array],
    segment_ids_BT: jax.Array | None,
    cached: Cached | None,
) -> tuple[jax.Array, LayerCache | None]:
    keep = functools.partial(rounded, compute=compute)
    with jax.named_scope("attention"):
        q_BTNH, k_BSNH, v_BSNH = (keep(x) for x in qkv_BTNH)
        q_BTNH, k_BSNH = (apply_rotary(x, *rotary, keep) for x in (q_BTNH, k_BSNH))
        q_BTNH, k_BSNH, v_BSNH = (
            checkpoint_name(x.astype(compute.dtype), _PROJECTION) for x in (q_BTNH, k_BSNH, v_BSNH)
        )
        k_BNSH, v_BNSH = (x.transpose(0, 2, 1, 3) for x in (k_BSNH, v_BSNH))
        if cached is None:
            mixed_BTNH = attend_causally(compute.attention, q_BTNH, k_BNSH, v_BNSH, segment_ids_BT)
            return checkpoint_name(mixed_BTNH.astype(compute.dtype), MIXED), None
        old, start_B, mask = cached
        cache = extend(old, start_B, k_BNSH, v_BNSH)
        return attend_to_cache(q_BTNH, cache.keys, cache.values, mask, start_B), cache


def _plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Returns x plus a bias, where there is one."""
    return x if bias is None else add_bias(x, bias)


def _activate(hidden_BTF: jax.Array, bias_F: jax.Array | None, compute: Compute) -> jax.Array:
    with jax.named_scope("feed_forward"):
        hidden_BTF = _plus(hidden_BTF, bias_F)
        if _HIDDEN in _KEPT.get(compute.remat, ()):
            # The largest array of a layer: kept as products take it.
            hidden_BTF = checkpoint_name(hidden_BTF.astype(compute.dtype), _HIDDEN)
            hidden_BTF = hidden_BTF.astype(jnp.float32)
        return rounded_gelu(hidden_BTF, compute) if compute.rounded else jax.nn.gelu(hidden_BTF)


def final_norm(
    norm: Norm, config: ModelConfig, compute: Compute, x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns the residual stream after the last norm, as the head takes it."""
    return rounded(apply_norm(norm, x_BTD, config), compute)


def apply_norm(norm: Norm, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the float32 layer norm of x."""
    return layer_norm(x_BTD, norm.scale, norm.offset, config.layer_norm_epsilon)


def rotary_rows(
    config: ModelConfig, compute: Compute, positions_BT: Int[Array, "B T"] | None, length: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the sines and cosines of the rotary table for positions; None: 0 to length - 1."""
    sin, cos = rotary_table(
        config.context_length, config.rotary_dim, config.rotary_base, compute.rotary_table
    )
    rows = (table_rows(table, positions_BT, length) for table in (sin, cos))
    sin_rows, cos_rows = (rounded(table, compute) for table in rows)
    return sin_rows, cos_rows


def _rematerialise(layer, remat: Remat):
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    return jax.checkpoint(layer, policy=policy)
