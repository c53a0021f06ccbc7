"""Rotary position embedding, as GPT-J has it: interleaved pairs, the leading R dims of each head.

Dim letters: B batch, T time, N heads, H head dim, R rotary dims, C context.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@functools.lru_cache(maxsize=8)
def _angles(context_length: int, rotary_dim: int, base: float, precision: str) -> np.ndarray:
    # The exponent runs over the rotary dims, not over the head's.
    exponents = np.arange(0, rotary_dim, 2).astype(precision) / np.dtype(precision).type(rotary_dim)
    inverse = np.dtype(precision).type(1) / np.dtype(precision).type(base) ** exponents
    return np.outer(np.arange(context_length).astype(precision), inverse)


def rotary_table(
    context_length: int, rotary_dim: int, base: float = 10_000.0, precision: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sin, cos), each float32 [C, R/2], of angles computed in float64.

    With `precision` float32 they are computed in float32, as transformers does: the angle of
    position 2,000 is then wrong by up to 1e-4.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; mesh-transformer-jax layers.py:128-148.
    """
    angles = _angles(context_length, rotary_dim, base, precision)
    return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


def apply_rotary(
    x_BTNH: Float[Array, "B T N H"],
    sin: Float[Array, "... R/2"],
    cos: Float[Array, "... R/2"],
    rounding: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Float[Array, "B T N H"]:
    """Returns x with its first R dims rotated, in float32; pairs are (0,1), (2,3), ...

    Args:
        x_BTNH: queries or keys.
        sin, cos: rows of the table for each position, [T, R/2] or [B, T, R/2].
        rounding: what becomes of each product and sum.
    """
    rotary_dim = 2 * sin.shape[-1]
    if sin.ndim == 2:
        sin, cos = sin[None], cos[None]
    sin, cos = (jnp.repeat(table[:, :, None, :], 2, axis=-1) for table in (sin, cos))
    x_BTNH = x_BTNH.astype(jnp.float32)
    turned, passed = x_BTNH[..., :rotary_dim], x_BTNH[..., rotary_dim:]
    rotated = rounding(rounding(turned * cos) + rounding(_rotate_pairs(turned) * sin))
    return jnp.concatenate([rotated, passed], axis=-1)


def _rotate_pairs(x: Float[Array, "B T N R"]) -> Float[Array, "B T N R"]:
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([-odd, even], axis=-1).reshape(x.shape)


def table_rows(
    table: np.ndarray, positions: Int[Array, "B T"] | None, length: int
) -> Float[Array, "... R/2"]:
    """Returns the rows for `positions`, or for 0 .. length-1 where they are None."""
    if positions is None:
        return jnp.asarray(table[:length])
    return jnp.asarray(table).at[positions].get(out_sharding=_rows_sharding(positions))


def _rows_sharding(positions: jax.Array) -> jax.sharding.PartitionSpec | None:
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.sharding.PartitionSpec(*jax.typeof(positions).sharding.spec, None)
