"""What a run needs of a checkpoint to go on: its small files, and arrays that are finite."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from meshlm.checkpoint import LayerReader, Restored
from meshlm.conversion.finite import Place, check_finite
from meshlm.core import strict_json
from meshlm.core.config import from_dict, to_dict, to_json
from meshlm.core.errors import BadInputError
from meshlm.training.config import RunConfig
from meshlm.training.metrics import NoiseScale

POSITION_FILE = "position.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run was: what its arrays do not say."""

    step: int
    tokens: int
    noise_scale: NoiseScale


def saved_files(
    constant: Mapping[str, bytes], step: int, record: RunConfig, noise: NoiseScale
) -> dict[str, bytes]:
    """Returns the files of a checkpoint: the constant ones, and the position in the data."""
    tokens = step * record.batch_size * record.seq_len
    position = Position(step=step, tokens=tokens, noise_scale=noise)
    return {**constant, POSITION_FILE: to_json(to_dict(position))}


def saved_noise(files: Mapping[str, bytes], where: str) -> NoiseScale:
    """Returns the running averages behind the noise scale from a checkpoint's files.

    Raises:
        BadInputError: the checkpoint has no usable position.json.
    """
    if POSITION_FILE not in files:
        raise BadInputError(f"{where} has no {POSITION_FILE}: it is no checkpoint of a run")
    name = f"{where}/{POSITION_FILE}"
    content = strict_json.parse_object(files[POSITION_FILE], name, remedy="use another checkpoint")
    return from_dict(Position, content, name).noise_scale


def refuse_not_finite(restored: Restored) -> None:
    """Raises BadInputError where weights or moments hold NaN or infinities; the array is named."""
    trained = ("params.", "optimizer.")
    state = {name: array for name, array in restored.arrays.items() if name.startswith(trained)}
    good = jax.device_get(_are_finite(state))
    for name in state:
        if not good[name]:
            # From the file, where every process sees the whole array.
            array = LayerReader(restored.path).read(name)
            check_finite(array, Place(f"checkpoint {restored.path}: array {name}", array.shape))


@jax.jit
def _are_finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # Zero times what is not finite is NaN, and sums keep it; maxima over devices do not. On CPUs
    # XLA computes this three times as fast as whether all are finite.
    return {name: jnp.isfinite(jnp.sum(array * 0)) for name, array in arrays.items()}
