"""Numerics profiles: in which precision, and in which order, the same weights are computed.

fast       products of the weights' type with float32 sums, everything between them float32.
hf         as transformers computes: angles of the rotary table in float32, and with bfloat16
           weights every product, norm and sum rounded to bfloat16.
mtj-2021   as the original trained GPT-J: weights rounded to bfloat16, everything else float32, the
           rotary table from float64; in sampling top-k and top-p come before the temperature.

In float32 the three differ by the rotary table of `hf` alone.
"""

import dataclasses
from typing import Literal, get_args

from meshlm.core.errors import UsageError
from meshlm.model.transformer import Compute

Profile = Literal["fast", "hf", "mtj-2021"]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
    """What a profile means for given weights."""

    weights: Dtype | None
    """What every weight is rounded to; None leaves each as it is stored."""
    compute: Compute
    filters_first: bool = False
    """Sampling limits its choice on the untempered distribution."""


def numerics(
    profile: Profile, dtype: Dtype | None, stored: str, quantize: Quantization | None = None
) -> Numerics:
    """Returns how to compute with weights whose matrices are stored as `stored`.

    Args:
        dtype: of weights and products (of the weights alone in `mtj-2021`); None: as stored, and
            float32 for float16, which bfloat16 cannot hold.
        quantize: the matrices are in int8; `dtype` is of the rest, and keys and values are bfloat16
            unless it is given.

    Raises:
        UsageError: there is no such profile or type, or they exclude each other.
    """
    if dtype not in (None, *get_args(Dtype)):
        raise UsageError(f"--dtype {dtype}: choose one of {', '.join(get_args(Dtype))}")
    own: Dtype = dtype or ("bfloat16" if stored == "bfloat16" else "float32")
    if quantize not in (None, *get_args(Quantization)):
        raise UsageError(f"--quantize {quantize}: choose {' or '.join(get_args(Quantization))}")
    if quantize is not None and profile != "fast":
        raise UsageError(
            f"--quantize {quantize} rounds as no other program does, and --profile {profile} "
            "computes as one of them: leave one of the two out"
        )
    if quantize is not None:
        # Keys and values too are read again for every token.
        return Numerics(weights=dtype, compute=Compute(dtype=dtype or "bfloat16"))
    if profile == "fast":
        return Numerics(weights=dtype, compute=Compute(dtype=own))
    if profile == "hf":
        compute = Compute(dtype=own, rotary_table="float32", rounded=True)
        return Numerics(weights=own, compute=compute)
    if profile == "mtj-2021":
        # Of weights stored in bfloat16 only sums over shards are not, and no rounding made those.
        weights = dtype or (None if stored == "bfloat16" else "bfloat16")
        return Numerics(weights=weights, compute=Compute(dtype="float32"), filters_first=True)
    raise UsageError(f"--profile {profile}: choose one of {', '.join(get_args(Profile))}")
