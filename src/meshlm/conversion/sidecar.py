"""What the original's format has and the native tree has not: values that differ by shard.

Each shard of the original has its own copy of the norms, of which the first was trained, and its
own share of the biases that are summed over shards. The native tree has one norm and the sum. With
the copies kept beside a converted checkpoint, it becomes the original's files again, bit for bit.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from meshlm.checkpoint.format_1 import to_current
from meshlm.core.errors import BadInputError
from meshlm.formats import safetensors

SIDECAR_FILE = "mtj.safetensors"
STEP, ADAM_COUNT, SCHEDULE_COUNT = "step", "adam_count", "schedule_count"
"""The counts of every shard, by their names in `Sidecar.arrays`."""
_FORMAT = "meshlm-mtj-sidecar"
_VERSION = "1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The values of every shard."""

    shards: int
    arrays: Mapping[str, np.ndarray]
    """`params.blocks.3.feed_forward.down.bias` -> [shards, D] as stored, and so on for each summed
    bias and norm of each group; `step`, and in full checkpoints `adam_count` and `schedule_count`,
    -> [shards]."""

    def to_bytes(self) -> bytes:
        """Returns the bytes of `mtj.safetensors`."""
        metadata = {"format": _FORMAT, "version": _VERSION, "shards": str(self.shards)}
        return safetensors.to_bytes(self.arrays, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Sidecar":
        """Returns the sidecar in the bytes of a file.

        Raises:
            BadInputError: they are not those of a sidecar.
        """
        arrays, metadata = safetensors.from_bytes(data, where)
        if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
            raise BadInputError(
                f"{where} is not a sidecar of version {_VERSION}: delete it, or convert again"
            )
        shards = metadata.get("shards", "")
        count = int(shards) if re.fullmatch(r"[1-9]\d{0,5}", shards) else 0
        for name, array in arrays.items():
            is_tensor = "." in name
            kinds = "fV" if is_tensor else "iu"
            fits = array.dtype.kind in kinds and array.ndim == (2 if is_tensor else 1)
            if not count or not fits or array.shape[0] != count:
                raise BadInputError(
                    f"{where}: {name} is {array.dtype.name} {list(array.shape)}, which is nothing "
                    f"that {shards!r} shards have: convert again"
                )
        # Sidecars have no format of their own: those beside checkpoints of format 1 have its names.
        arrays = {to_current(name): array for name, array in arrays.items()}
        return cls(shards=count, arrays=arrays)
