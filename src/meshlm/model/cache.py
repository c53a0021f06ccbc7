"""The key-value cache of decoding.

Dim letters: B batch, T new time, S places, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meshlm.core.sharding import reshard
from meshlm.core.tree import pytree
from meshlm.model.config import ModelConfig


@pytree
class LayerCache:
    """One layer's rotated keys and its values; place s holds position s."""

    keys: Float[Array, "B N S H"]
    values: Float[Array, "B N S H"]


@pytree
class Cache:
    """The caches of all layers."""

    layers: tuple[LayerCache, ...]

    @property
    def num_places(self) -> int:
        """Positions that fit."""
        return self.layers[0].keys.shape[2]


def init_cache(config: ModelConfig, batch_size: int, num_places: int, dtype: str) -> Cache:
    """Returns an empty cache, split over the mesh like activations (`batch`, `heads`)."""
    shape = (batch_size, config.num_heads, num_places, config.head_dim)

    def empty() -> jax.Array:
        return reshard(jnp.zeros(shape, dtype), "batch", "heads", None, None)

    layers = (LayerCache(keys=empty(), values=empty()) for _ in range(config.num_layers))
    return Cache(layers=tuple(layers))


def extend(
    cache: LayerCache,
    start_B: Int[Array, "B"],
    k_BNTH: Float[Array, "B N T H"],
    v_BNTH: Float[Array, "B N T H"],
) -> LayerCache:
    """Returns the cache with T new keys and values written from place `start_B[b]` on in row b."""

    def write(row: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row, new, (0, start, 0))

    def write_all(old: jax.Array, new_BNTH: jax.Array) -> jax.Array:
        return jax.vmap(write)(old, new_BNTH.astype(old.dtype), start_B)

    return LayerCache(keys=write_all(cache.keys, k_BNTH), values=write_all(cache.values, v_BNTH))


def cache_mask(cache: Cache, positions_BT: Int[Array, "B T"]) -> Bool[Array, "B N T S"]:
    """Returns which places each new token sees: its own position and those before."""
    places = jnp.arange(cache.num_places, dtype=positions_BT.dtype)
    return places[None, None, None, :] <= positions_BT[:, None, :, None]
