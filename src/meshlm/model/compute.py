"""How the forward pass is computed, and the rounding of the profile that follows transformers."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig, current_rules
from meshlm.model.config import ModelConfig
from meshlm.model.params import count_params
from meshlm.ops.fast_attention import AttentionName

ReduceDtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "minimal", "feed-forward", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the forward pass is computed; it changes speed, memory and rounding, not the model."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Operands of the matrix products; sums are float32."""
    remat: Remat = "none"
    """What the backward pass computes again: nothing, all but the products' results, all but the
    feed-forward's first product, everything."""
    reduce_dtype: ReduceDtype = "float32"
    """In which the gradients of matrices are summed over devices; bfloat16 takes products of it."""
    attention: AttentionName = "plain"
    """The form of attention to whole sequences (ops/fast_attention.py)."""
    scan_layers: bool = True
    """One compiled layer for all (fast to compile), or each layer by itself."""
    rotary_table: Literal["float64", "float32"] = "float64"
    """Precision in which the rotary angles are computed; their sines are float32."""
    rounded: bool = False
    """Every product, norm and sum is rounded to `dtype`, and the residual stream with them."""


# A layer compiled by itself trains faster on a CPU, but takes its own time to compile.
_MOST_UNROLLED_LAYERS = 12


def choose_compute(
    model: ModelConfig,
    mesh: MeshConfig,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    remat: Remat | None = None,
    reduce_dtype: ReduceDtype = "float32",
) -> Compute:
    """Returns how a model is trained on a mesh, by the rules entered, where nothing else is asked.

    Args:
        remat: what the backward pass computes again; None chooses by the model's size.

    Raises:
        UsageError: gradients cannot be summed in bfloat16 where the products are float32.
    """
    if dtype == "float32" and reduce_dtype == "bfloat16":
        raise UsageError("--reduce-dtype bfloat16: it takes --compute-dtype bfloat16")
    large = count_params(model) >= 1e9
    # What is not computed again is kept, the weights that were gathered for use included.
    kept = "minimal" if mesh.shards(current_rules().embed) > 1 else "none"
    return Compute(
        dtype=dtype,
        remat=remat or ("full" if large else kept),
        reduce_dtype=reduce_dtype,
        scan_layers=model.num_layers > _MOST_UNROLLED_LAYERS,
    )


def rounded(x: jax.Array, compute: Compute) -> jax.Array:
    """Returns float32 numbers, those that `compute.dtype` has where `compute.rounded` is set."""
    if not compute.rounded or compute.dtype == "float32":
        return x
    # A cast there and back is one that the compiler may leave out.
    kept = jnp.finfo(compute.dtype)
    return jax.lax.reduce_precision(x, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)


def rounded_gelu(x: jax.Array, compute: Compute) -> jax.Array:
    """Returns the tanh GELU in transformers' steps, each of them rounded."""
    x = rounded(x, compute)
    cube = rounded(rounded(x * x, compute) * x, compute)
    inner = rounded(x + rounded(0.044715 * cube, compute), compute)
    tanh = rounded(jnp.tanh(rounded(math.sqrt(2 / math.pi) * inner, compute)), compute)
    return rounded(rounded(0.5 * x, compute) * rounded(1.0 + tanh, compute), compute)
