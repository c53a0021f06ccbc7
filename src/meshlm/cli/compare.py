"""meshlm compare"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from meshlm.comparison import Distance, Side, compare
from meshlm.core.errors import UsageError
from meshlm.generation.profiles import Dtype, Profile

EXAMPLES = (
    "meshlm compare gpt-j-hf gpt-j-mtj --dtype float32",
    "meshlm compare gpt-j --profile fast --other-profile hf",
    "meshlm compare runs/first runs/second --text-file page.txt --json",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say how far the logits of two checkpoints, or of two profiles of one, are apart."""

    path: Positional[Path]
    """Weights in any format that `meshlm convert` reads."""
    other: Positional[Path | None] = None
    """The weights to compare with; the same ones unless given."""
    profile: Profile = "fast"
    """How the first are computed."""
    other_profile: Profile | None = None
    """How the others are computed; as the first unless given."""
    dtype: Dtype | None = None
    """Of the first's weights and products; left out, as they are stored."""
    other_dtype: Dtype | None = None
    """Of the others'; as the first's unless given."""
    config: str | None = None
    """The original's JSON config or a preset, where none lies beside its weights."""
    allow_pickle: bool = False
    """Read a pytorch_model.bin, as weights alone, by torch in a process of its own."""
    verify: bool = False
    """First hold every byte against certificate.json, or the download's checksums, beside them."""
    text_file: Path | None = None
    """A text for them to read; one that comes with MeshLM unless given."""
    length: int = 256
    """The most tokens that they read."""
    json: bool = False
    """Print one JSON object instead."""


def run(config: Config) -> None:
    """Prints the distance."""
    if config.length < 1:
        raise UsageError(f"--length {config.length}: give 1 or more")
    one = Side(
        path=config.path,
        profile=config.profile,
        dtype=config.dtype,
        config=config.config,
        allow_pickle=config.allow_pickle,
        verify=config.verify,
    )
    other = dataclasses.replace(
        one,
        path=config.other or config.path,
        profile=config.other_profile or config.profile,
        dtype=config.other_dtype or config.dtype,
    )
    distance = compare(one, other, _text(config), config.length)
    if config.json:
        values = dataclasses.asdict(distance)
        values["relative_difference"] = distance.relative_difference
        print(json.dumps(values, allow_nan=False))
    else:
        _print(one, other, distance)


def _text(config: Config) -> str | None:
    if config.text_file is None:
        return None
    try:
        return config.text_file.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--text-file {config.text_file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--text-file {config.text_file} is not UTF-8: {error}") from None


def _print(one: Side, other: Side, distance: Distance) -> None:
    for side in (one, other):
        print(f"{side.path} ({side.profile}, {side.dtype or 'as stored'})")
    print(f"  tokens                {distance.tokens}")
    print(
        f"  max |difference|      {distance.max_difference:.3e}   "
        f"({distance.relative_difference:.1e} of the largest logit)"
    )
    print(f"  mean |difference|     {distance.mean_difference:.3e}")
    print(f"  KL, nats a token      {distance.kl:.3e}")
    print(f"  same most probable    {distance.top1_agreement:.1%}")
