"""The parameters: one description a weight, and everything else derived from it.

Dim letters: L layers, V vocabulary rows, D model, N heads, H head dim, F feed-forward.

A weight is stored as [out, in], the way torch keeps it: the product contracts the last dims of both
operands, the layout in which CPUs stream weights fastest. Layers are stacked along a leading dim L.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from meshlm.core import sharding
from meshlm.core.tree import PyTree, map_named, pytree
from meshlm.model.config import ModelConfig


@pytree
class Block:
    """One layer, or all of them with a leading dim L: attention and feed-forward in parallel."""

    norm_scale: Float[Array, "D"]
    norm_offset: Float[Array, "D"]
    query: Float[Array, "N H D"]
    key: Float[Array, "N H D"]
    value: Float[Array, "N H D"]
    attention_out: Float[Array, "D N H"]
    ff_in: Float[Array, "F D"]
    ff_in_bias: Float[Array, "F"]
    ff_out: Float[Array, "D F"]
    ff_out_bias: Float[Array, "D"]


@pytree
class Params:
    """All weights of a GPT-J. `blocks` is stacked [L, ...], or a tuple of L blocks for decoding."""

    embedding: Float[Array, "V D"]
    blocks: Any
    final_norm_scale: Float[Array, "D"]
    final_norm_offset: Float[Array, "D"]
    head: Float[Array, "V D"]
    head_bias: Float[Array, "V"]
    embedding_bias: Float[Array, "D"] | None = None
    """Added to every embedding; None in a model without one."""


# The matrices that products take, and in the type of the products; the embedding is looked up.
PRODUCT_WEIGHTS = frozenset(
    ("query", "key", "value", "attention_out", "ff_in", "ff_out", "head"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """What is to be known of one weight before it exists."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    """Logical dims, the keys of the rule table in core/sharding.py."""
    std: float = 0.0
    """Sigma of the normal that is cut at two sigma; 0 for a constant."""
    fill: float = 0.0
    """The constant, where std is 0."""
    decay: bool = False
    """Weight decay pulls on it (matrices only)."""
    shared: bool = False
    """A bias of which the original keeps a share in each shard, to be summed."""


def describe(config: ModelConfig) -> PyTree:
    """Returns a `Params` of `Weight`s for this shape.

    The standard deviations are the original's: 1/sqrt(V) for the embedding, 1/sqrt(D) for what
    reads the residual stream, (2/L)/sqrt(D) for what writes to it, and zero biases.

    Source: mesh-transformer-jax, layers.py:185, 253-259.
    """
    L, D, F, V = config.num_layers, config.d_model, config.d_ff, config.vocab_size
    N, H = config.num_heads, config.head_dim
    read_std, write_std = 1 / math.sqrt(D), 2 / L / math.sqrt(D)

    def matrix(shape: tuple[int, ...], dims: tuple[str | None, ...], std: float) -> Any:
        return Weight(shape=shape, dims=dims, std=std, decay=True)

    def vector(shape: tuple[int, ...], dims: tuple[str | None, ...], fill: float = 0.0) -> Any:
        return Weight(shape=shape, dims=dims, fill=fill)

    def shared(shape: tuple[int, ...], dims: tuple[str | None, ...]) -> Any:
        return Weight(shape=shape, dims=dims, shared=True)

    stacked = "layers"
    blocks = Block(
        norm_scale=vector((L, D), (stacked, None), 1.0),
        norm_offset=vector((L, D), (stacked, None)),
        query=matrix((L, N, H, D), (stacked, "heads", None, "embed"), read_std),
        key=matrix((L, N, H, D), (stacked, "heads", None, "embed"), read_std),
        value=matrix((L, N, H, D), (stacked, "heads", None, "embed"), read_std),
        attention_out=matrix((L, D, N, H), (stacked, "embed", "heads", None), write_std),
        ff_in=matrix((L, F, D), (stacked, "ff", "embed"), read_std),
        ff_in_bias=vector((L, F), (stacked, "ff")),
        ff_out=matrix((L, D, F), (stacked, "embed", "ff"), write_std),
        ff_out_bias=shared((L, D), (stacked, None)),
    )
    return Params(
        embedding=matrix((V, D), (None, "table_embed"), 1 / math.sqrt(V)),
        blocks=blocks,
        final_norm_scale=vector((D,), (None,), 1.0),
        final_norm_offset=vector((D,), (None,)),
        head=matrix((V, D), ("vocab", "embed"), read_std),
        head_bias=vector((V,), ("vocab",)),
        embedding_bias=shared((D,), (None,)) if config.embedding_bias else None,
    )


def count_params(config: ModelConfig) -> int:
    """Returns the number of parameters of this shape."""
    return sum(math.prod(weight.shape) for weight in jax.tree.leaves(describe(config)))


def decay_mask(config: ModelConfig) -> PyTree:
    """Returns a `Params` of bools: True where weight decay pulls."""
    return jax.tree.map(lambda weight: weight.decay, describe(config))


def shared_mask(config: ModelConfig) -> PyTree:
    """Returns a `Params` of bools: True for the biases that the original sums over shards."""
    return jax.tree.map(lambda weight: weight.shared, describe(config))


def abstract_params(
    config: ModelConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> PyTree:
    """Returns a `Params` of `jax.ShapeDtypeStruct`s, with shardings where a mesh is given."""

    def abstract(weight: Weight) -> jax.ShapeDtypeStruct:
        where = None if mesh is None else sharding.sharding_of(mesh, *weight.dims)
        return jax.ShapeDtypeStruct(weight.shape, dtype, sharding=where)

    return jax.tree.map(abstract, describe(config))


def init_params(config: ModelConfig, key: jax.Array) -> PyTree:
    """Returns freshly drawn float32 parameters; the same on every mesh.

    Call it under `jax.jit`, in the mesh where the weights are to live: each is drawn in its shards.
    """

    def init(name: str, weight: Weight) -> jax.Array:
        if weight.std == 0:
            value = jnp.full(weight.shape, weight.fill, jnp.float32)
        else:
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            value = weight.std * jax.random.truncated_normal(own_key, -2.0, 2.0, weight.shape)
        return sharding.reshard(value, *weight.dims)

    return map_named(init, describe(config))


def unstack_blocks(params: Params) -> Params:
    """Returns the same parameters with one `Block` of arrays a layer, as decoding wants them."""
    num_layers = params.blocks.norm_scale.shape[0]
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

    map_named(check, describe(config))
