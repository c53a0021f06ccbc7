"""Products on one CPU, in the forms for which XLA has fast kernels there.

In bfloat16 the weight gradient of a plain product falls back to a third of the speed, because both
operands are read across their rows. Here one of them, the smaller, is transposed first, in tiles.
The plain references are `Dense.plain_dot` (ops/weights.py), a plain sum and `loss.plain_head_loss`.

Dim letters: M rows, K contracted, N out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshlm.core.sharding import is_one_cpu

_TILE = 16
_barrier = jax.lax.optimization_barrier


def is_faster(dtype: Any) -> bool:
    """True where this module's products are the fast ones: bfloat16 on one CPU device."""
    return dtype == jnp.bfloat16 and is_one_cpu()


def product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Returns the float32 product of two matrices, contracting one dim of each."""
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def transpose(x_MN: Float[Array, "M N"]) -> Float[Array, "N M"]:
    """Returns the transpose, made in tiles: several times as fast as XLA's own.

    The barriers keep the compiler from fusing a cast into the strided reads, and from folding the
    transposition into the product that follows, which has no kernel for it.
    """
    num_rows, num_columns = x_MN.shape
    rows, columns = (_TILE if size % _TILE == 0 else 1 for size in x_MN.shape)
    tiles = _barrier(x_MN).reshape(num_rows // rows, rows, num_columns // columns, columns)
    return _barrier(tiles.transpose(2, 3, 0, 1).reshape(num_columns, num_rows))


def outer(g_MN: Float[Array, "M N"], x_MK: Float[Array, "M K"]) -> Float[Array, "N K"]:
    """Returns g^T x, the gradient of a weight [N, K]."""
    if x_MK.shape[1] < g_MN.shape[1]:
        return transpose(product(transpose(x_MK), g_MN, 1, 0))
    return product(transpose(g_MN), x_MK, 1, 0)


@jax.custom_vjp
def dot(x_MK: Float[Array, "M K"], weight_NK: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """Returns x times the weight, in float32."""
    if x_MK.shape[0] == 1:
        # For a single row XLA converts all of the weight to float32 first: two are faster.
        return product(jnp.pad(x_MK, ((0, 1), (0, 0))), weight_NK, 1, 1)[:1]
    return product(x_MK, weight_NK, 1, 1)


def _dot_forward(x_MK: jax.Array, weight_NK: jax.Array):
    return dot(x_MK, weight_NK), (x_MK, weight_NK)


def _dot_backward(saved: tuple[jax.Array, jax.Array], g_MN: jax.Array):
    x_MK, weight_NK = saved
    # A float32 gradient would turn both products into float32 ones.
    g_MN = _barrier(g_MN.astype(x_MK.dtype))
    dx_MK = product(g_MN, weight_NK, 1, 0).astype(x_MK.dtype)
    return dx_MK, outer(g_MN, x_MK).astype(weight_NK.dtype)


dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def add_bias(x_MN: Float[Array, "M N"], bias_N: Float[Array, "N"]) -> Float[Array, "M N"]:
    """Returns x plus the bias, whose gradient is a `column_sum`."""
    return x_MN + bias_N[None]


def column_sum(g_MN: Float[Array, "M N"]) -> Float[Array, "N"]:
    """Returns the sum of the rows, as a product with ones: JAX 0.10 is slow to reduce."""
    return product(jnp.ones((_TILE, g_MN.shape[0]), g_MN.dtype), g_MN, 1, 0)[0]


add_bias.defvjp(
    lambda x_MN, bias_N: (add_bias(x_MN, bias_N), None), lambda _, g_MN: (g_MN, column_sum(g_MN))
)
