"""Will the checkpoints that were asked for fit on the disk?"""

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from meshlm.checkpoint.folder import ASIDE_NAME, complete_steps, steps_aside
from meshlm.core.errors import UsageError

_FIXED_BYTES = 64 * 1024
_BYTES_PER_ARRAY = 2 * 1024
_INDEX_SHARE = 0.01


class HasShape(Protocol):
    """What is asked of an array here: a jax.Array or a jax.ShapeDtypeStruct has it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


def estimate_bytes(abstract: Mapping[str, HasShape]) -> int:
    """Bytes that one checkpoint of these arrays takes at most, small files left out.

    Arrays are stored without compression, so it is their size and a little for the index.
    """
    payload = sum(math.prod(a.shape) * a.dtype.itemsize for a in abstract.values())
    return int(payload * (1 + _INDEX_SHARE)) + _BYTES_PER_ARRAY * len(abstract) + _FIXED_BYTES


def steps_kept(steps: Iterable[int], *, keep: int, keep_every: int | None) -> set[int]:
    """The steps that retention keeps: the `keep` newest, and the multiples of `keep_every`."""
    ordered = sorted(steps)
    multiples = {s for s in ordered if keep_every and s % keep_every == 0}
    return multiples | set(ordered[-keep:])


def is_superseded(step: int, complete: Iterable[int], *, keep: int, keep_every: int | None) -> bool:
    """Whether retention would have deleted a good checkpoint of a step that is none, or in doubt.

    That is when `keep` newer ones are complete and, for a multiple of `keep_every`, so is another
    one of the same step.
    """
    steps = set(complete)
    is_lasting = bool(keep_every) and step % (keep_every or 1) == 0
    return sum(s > step for s in steps) >= keep and (not is_lasting or step in steps)


def check_free_disk(
    folder: Path,
    abstract: Mapping[str, HasShape],
    save_steps: Iterable[int],
    *,
    keep: int,
    keep_every: int | None,
    resumed: int | None = None,
) -> None:
    """Returns when the checkpoints of the coming `save_steps` will fit beside each other.

    Raises: UsageError with the bytes needed and free. A new checkpoint is whole before an old one
    goes, so there is one more for a moment than is kept. Steps above `resumed` are passed over:
    they keep their place until as many newer ones are there as are kept, so they free none of it.
    """
    present = {s for s in complete_steps(folder) if resumed is None or s <= resumed}
    at_hand, most = len(present), 0
    for step in save_steps:
        present |= {step}
        most = max(most, len(present))
        present = steps_kept(present, keep=keep, keep_every=keep_every)
    needed = max(0, most - at_hand) * estimate_bytes(abstract)
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        passed_over = "" if not steps_aside(folder) else f"; {folder / ASIDE_NAME} may be deleted"
        raise UsageError(
            f"too little disk for {most} checkpoints at once: {needed / 1e9:,.2f} GB more are "
            f"needed at {folder} and {free / 1e9:,.2f} GB are free; free some, lower --keep "
            f"({keep}), raise --keep-every, or choose another --run"
            f"{passed_over}"
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
