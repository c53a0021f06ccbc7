"""The parameters: one `Weight` declares each of them, and everything else is derived from it.

Dim letters: L layers, V vocabulary rows, P positions, D model, N heads, H head dim, F feed-forward.

A weight is stored as [out, in], the way torch keeps it: the product contracts the trailing dims of
both operands, the layout in which CPUs stream weights fastest. Layers are stacked along a leading
dim L.
"""

import dataclasses
import functools
import math
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from meshlm.core import sharding
from meshlm.core.tree import PyTree, from_named, pytree, to_named
from meshlm.model.config import ModelConfig
from meshlm.model.families import check_supported
from meshlm.ops.weights import Matrix


@pytree
class Linear:
    """A product with a matrix, and the bias that is added to it; None where there is none."""

    weight: Float[Array, "..."] | Matrix
    bias: Float[Array, "..."] | None = None


@pytree
class Norm:
    """A layer norm."""

    scale: Float[Array, "D"]
    offset: Float[Array, "D"]


@pytree
class Attention:
    """Weights [N, H, D] that read the residual stream, and one [D, N, H] that writes to it."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear


@pytree
class FeedForward:
    """Weights [F, D] and [D, F], with the activation between them."""

    up: Linear
    down: Linear


@pytree
class Block:
    """One layer, or all of them with a leading dim L."""

    attention_norm: Norm
    ff_norm: Norm | None = None
    """None where `attention_norm` serves both."""
    attention: Attention
    feed_forward: FeedForward


@pytree
class Embedding:
    """Token embedding, learned positions and bias."""

    tokens: Float[Array, "V D"] | Matrix
    positions: Float[Array, "P D"] | None = None
    """None where positions are not learned."""
    bias: Float[Array, "D"] | None = None


Stacked = Block
"""All layers as one block, each array [L, ...], as training has them."""
Unstacked = tuple[Block, ...]
"""One block per layer, as decoding has them."""


@pytree
class Params:
    """All parameters of a model."""

    embedding: Embedding
    blocks: Stacked | Unstacked
    final_norm: Norm
    head: Linear
    """Logits of the vocabulary."""


Use = Literal["lookup", "product", "vector"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """Declaration of one parameter: shape, logical dims, initializer, uses."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    """Logical dims, the keys of the rule table in core/sharding.py."""
    std: float = 0.0
    """Standard deviation of the initial normal, before truncation at two of it; 0: a constant."""
    fill: float = 0.0
    """The initial constant, where std is 0."""
    decay: bool = False
    """Whether weight decay applies (matrices only)."""
    shared: bool = False
    """mesh-transformer-jax stores one summand of this bias per shard; the bias is their sum."""
    uses: frozenset[Use]
    """Rows are looked up, products contract it, or it is added or multiplied as a vector."""
    contract: int = 0
    """Trailing dims that its product contracts."""
    draw_name: str
    """Seeds the initial values: the name in checkpoints of format 1, or for a parameter that format
    1 does not have, its own name."""
    normed_last: bool = False
    """Summed last in gradient norms, to keep the rounding of format 1, whose tree ended with it."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def of_layer(self) -> "Weight":
        """The declaration of one layer of a stack: without the leading dim."""
        return dataclasses.replace(self, shape=self.shape[1:], dims=self.dims[1:])


_CACHED_CONFIGS = 64


@functools.lru_cache(_CACHED_CONFIGS)
def weight_tree(config: ModelConfig) -> PyTree:
    """Returns a `Params` of `Weight`s, computed once a config.

    The standard deviations are mesh-transformer-jax's: 1/sqrt(V) for the embedding, 1/sqrt(D) for
    what reads the residual stream, (2/L)/sqrt(D) for what writes to it, and zero biases.

    Raises:
        UsageError: the architecture is not supported.

    Source: mesh-transformer-jax, layers.py:185, 253-259.
    """
    check_supported(config)
    D, V = config.d_model, config.vocab_size
    embedding = Embedding(
        tokens=_matrix("embedding", (V, D), (None, "table_embed"), 1 / math.sqrt(V), lookup=True),
        bias=_vector("embedding_bias", (D,), (None,), shared=True, normed_last=True)
        if config.has_bias("embedding")
        else None,
    )
    return Params(
        embedding=embedding,
        blocks=_stacked_block(config),
        final_norm=_norm("final_norm", (D,), (None,)),
        head=Linear(
            weight=_matrix("head", (V, D), ("vocab", "embed"), 1 / math.sqrt(D)),
            bias=_vector("head_bias", (V,), ("vocab",)) if config.has_bias("head") else None,
        ),
    )


def _stacked_block(config: ModelConfig) -> PyTree:
    L, D, F = config.num_layers, config.d_model, config.d_ff
    N, H = config.num_heads, config.head_dim
    read_std, write_std = 1 / math.sqrt(D), 2 / L / math.sqrt(D)

    def projection(name: str) -> Linear:
        shape, dims = (L, N, H, D), ("layers", "heads", None, "embed")
        return Linear(weight=_matrix(f"blocks.{name}", shape, dims, read_std))

    up_dims, down_dims = ("layers", "ff", "embed"), ("layers", "embed", "ff")
    has_bias = config.has_bias("feed_forward")
    return Block(
        attention_norm=_norm("blocks.norm", (L, D), ("layers", None)),
        attention=Attention(
            query=projection("query"),
            key=projection("key"),
            value=projection("value"),
            out=Linear(
                weight=_matrix(
                    "blocks.attention_out",
                    (L, D, N, H),
                    ("layers", "embed", "heads", None),
                    write_std,
                    contract=2,
                )
            ),
        ),
        feed_forward=FeedForward(
            up=Linear(
                weight=_matrix("blocks.ff_in", (L, F, D), up_dims, read_std),
                bias=_vector("blocks.ff_in_bias", (L, F), ("layers", "ff")) if has_bias else None,
            ),
            down=Linear(
                weight=_matrix("blocks.ff_out", (L, D, F), down_dims, write_std),
                bias=_vector("blocks.ff_out_bias", (L, D), ("layers", None), shared=True)
                if has_bias
                else None,
            ),
        ),
    )


def _matrix(
    draw_name: str,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    std: float,
    *,
    lookup: bool = False,
    contract: int = 1,
) -> Any:
    return Weight(
        shape=shape,
        dims=dims,
        std=std,
        decay=True,
        uses=frozenset({"lookup" if lookup else "product"}),
        contract=0 if lookup else contract,
        draw_name=draw_name,
    )


def _vector(
    draw_name: str,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    *,
    fill: float = 0.0,
    shared: bool = False,
    normed_last: bool = False,
) -> Any:
    return Weight(
        shape=shape,
        dims=dims,
        fill=fill,
        shared=shared,
        uses=frozenset({"vector"}),
        draw_name=draw_name,
        normed_last=normed_last,
    )


def _norm(draw_name: str, shape: tuple[int, ...], dims: tuple[str | None, ...]) -> Norm:
    return Norm(
        scale=_vector(f"{draw_name}_scale", shape, dims, fill=1.0),
        offset=_vector(f"{draw_name}_offset", shape, dims),
    )


@functools.lru_cache(_CACHED_CONFIGS)
def weight_table(config: ModelConfig) -> Mapping[str, Weight]:
    """Returns every `Weight` by its dotted name, in the order of the tree; once a config."""
    return types.MappingProxyType(to_named(weight_tree(config)))


@functools.lru_cache(_CACHED_CONFIGS)
def layer_table(config: ModelConfig) -> Mapping[str, Weight]:
    """Returns one layer's `Weight`s by their names below `blocks`; once a config."""
    table = to_named(weight_tree(config).blocks)
    return types.MappingProxyType({name: weight.of_layer for name, weight in table.items()})


def count_params(config: ModelConfig) -> int:
    """Returns the number of parameters of this model."""
    return sum(weight.size for weight in weight_table(config).values())


def map_weights(
    function: Callable[[Weight, Any], Any], config: ModelConfig, params: PyTree
) -> PyTree:
    """Returns parameters with each leaf replaced by `function(weight, leaf)`.

    Args:
        params: stacked, or with one block per layer; then `weight` declares a layer's leaf.
    """
    weights = weight_tree(config)
    if isinstance(params.blocks, tuple):
        layer = from_named(weights.blocks, layer_table(config))
        weights = dataclasses.replace(weights, blocks=(layer,) * config.num_layers)
    return jax.tree.map(function, weights, params)


def abstract_params(
    config: ModelConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> PyTree:
    """Returns a `Params` of `jax.ShapeDtypeStruct`s, with shardings where a mesh is given."""

    def abstract(weight: Weight) -> jax.ShapeDtypeStruct:
        where = None if mesh is None else sharding.sharding_of(mesh, *weight.dims)
        return jax.ShapeDtypeStruct(weight.shape, dtype, sharding=where)

    return jax.tree.map(abstract, weight_tree(config))


def init_params(config: ModelConfig, key: jax.Array) -> PyTree:
    """Returns freshly drawn float32 parameters; the same on every mesh.

    Call it under `jax.jit`, in the mesh where the weights are to live: each is drawn in its shards.
    """

    def init(weight: Weight) -> jax.Array:
        if weight.std == 0:
            value = jnp.full(weight.shape, weight.fill, jnp.float32)
        else:
            own_key = jax.random.fold_in(key, zlib.crc32(weight.draw_name.encode()))
            value = weight.std * jax.random.truncated_normal(own_key, -2.0, 2.0, weight.shape)
        return sharding.reshard(value, *weight.dims)

    return jax.tree.map(init, weight_tree(config))


def unstack_blocks(params: Params) -> Params:
    """Returns the same parameters with one `Block` of arrays a layer, as decoding wants them."""
    assert isinstance(params.blocks, Block)
    num_layers = params.blocks.attention_norm.scale.shape[0]
    blocks = tuple(jax.tree.map(lambda x, i=i: x[i], params.blocks) for i in range(num_layers))
    return dataclasses.replace(params, blocks=blocks)


def check_divides(
    config: ModelConfig, mesh: sharding.MeshConfig, rules: sharding.Rules | None = None
) -> None:
    """Raises UsageError where a mesh axis does not divide a dim that it splits.

    Args:
        rules: those by which weights are split, where they are not entered.
    """
    rules = rules or sharding.current_rules()

    def check(name: str, weight: Weight) -> None:
        for size, dim in zip(weight.shape, weight.dims, strict=True):
            shards = mesh.shards(rules.axes(dim))
            if size % shards:
                raise sharding.UsageError(
                    f"{name} has {size} rows of {dim!r}, which {shards} devices cannot share "
                    f"evenly: choose --mesh.* that divide {size}"
                )

    for name, weight in weight_table(config).items():
        check(name, weight)
