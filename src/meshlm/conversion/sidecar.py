"""What the original's format has and the native tree has not: values that differ by shard.

Each shard of the original has its own copy of the norms, of which the first was trained, and its
own share of the biases that are summed over shards. The native tree has one norm and the sum. With
the copies kept beside a converted checkpoint, it becomes the original's files again, bit for bit.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

SIDECAR_FILE = "mtj.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The values of every shard."""

    shards: int
    arrays: Mapping[str, np.ndarray]
    """`params.blocks.3.ff_out_bias` -> [shards, D] as stored, and so on for each summed bias and
    norm of each group; `step`, and in full checkpoints the two counts, -> [shards]."""
