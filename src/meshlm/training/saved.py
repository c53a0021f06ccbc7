"""The small files of a checkpoint, and what of them a run needs to go on."""

import dataclasses
import json
from collections.abc import Mapping

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
    content = json.loads(files[POSITION_FILE])
    return from_dict(Position, content, f"{where}/{POSITION_FILE}").noise_scale
