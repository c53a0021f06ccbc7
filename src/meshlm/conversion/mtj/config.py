"""The original's JSON config, read strictly: the model's shape, and the recipe it was trained by.

Source: mesh-transformer-jax, configs/*.json, device_train.py, layers.py (getnorm, pe).
"""

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j

MAX_CONFIG_BYTES = 1 << 20

_SHAPE = ("layers", "d_model", "n_heads", "n_vocab")
_COUNTS = (
    *_SHAPE,
    "pe_rotary_dims",
    "seq",
    "d_head",
    "cores_per_replica",
    "per_replica_batch",
    "gradient_accumulation_steps",
    "warmup_steps",
    "anneal_steps",
    "total_steps",
    "tpu_size",
    "val_batches",
    "val_every",
    "ckpt_every",
    "keep_every",
)
_MAY_BE_ZERO = ("warmup_steps", "anneal_steps")
_NUMBERS = ("lr", "end_lr", "weight_decay")
_CHOICES = {"norm": "layernorm", "pe": "rotary"}
# Of these only the names are known: no number of the model depends on them.
_REMARKS = (
    "bucket",
    "model_dir",
    "train_set",
    "val_set",
    "eval_harness_tasks",
    "name",
    "wandb_project",
    "comment",
    "early_cast",
    "optimizer",
    "sampler",
)
_KNOWN = (*_COUNTS, *_NUMBERS, *_CHOICES, *_REMARKS)
_MOST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class OldConfig:
    """One of the original's configs."""

    path: str
    model: ModelConfig
    settings: dict[str, Any]
    """Every key of the file; those of the model and the recipe are checked."""


def read_old_config(path: Path) -> OldConfig:
    """Returns a config of the original's.

    Raises:
        UsageError: there is no such file.
        BadInputError: it is none, or one of another model than GPT-J.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; give the original's JSON config")
    return parse_old_config(files.read(path, MAX_CONFIG_BYTES), str(path))


def parse_old_config(data: bytes, where: str) -> OldConfig:
    """Returns a config of the original's from the bytes of its file.

    Raises:
        BadInputError: as `read_old_config`.
    """
    settings = strict_json.parse_object(
        data, where, max_bytes=MAX_CONFIG_BYTES, remedy="give the original's config"
    )
    for key in settings:
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else "it could change the numbers: refused"
            raise BadInputError(f"{where} has an unknown key {key!r}; {hint}")
    for key, only in _CHOICES.items():
        if settings.get(key) != only:
            raise BadInputError(
                f"{where}: {key} is {settings.get(key)!r}; GPT-J has {only!r}, and another one "
                "gives other numbers: refused"
            )
    for key in _COUNTS:
        if key in settings:
            _check_count(key, settings[key], where)
    for key in _NUMBERS:
        if key in settings:
            _check_number(key, settings[key], where)
    return OldConfig(path=where, model=_model(settings, where), settings=settings)


def looks_like_old_config(data: bytes) -> bool:
    """Tells whether a file is meant to be a config of the original's."""
    try:
        settings = strict_json.parse_object(data, "", max_bytes=MAX_CONFIG_BYTES)
    except strict_json.JsonError:
        return False
    return all(key in settings for key in _SHAPE)


def config_of_model(model: ModelConfig, shards: int) -> dict[str, Any]:
    """Returns what the original's config says of a model."""
    return {
        "layers": model.num_layers,
        "d_model": model.d_model,
        "n_heads": model.num_heads,
        "n_vocab": model.vocab_size,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": model.rotary_dim,
        "seq": model.context_length,
        "cores_per_replica": shards,
    }


def check_shards(model: ModelConfig, shards: int) -> None:
    """Raises UsageError where heads or vocabulary cannot be cut into so many shards."""
    for name, size in (("heads", model.num_heads), ("rows of vocabulary", model.vocab_size)):
        if shards < 1 or size % shards:
            common = math.gcd(model.num_heads, model.vocab_size)
            fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise UsageError(
                f"--shards {shards}: {size} {name} cannot be cut into so many; give one of "
                f"{', '.join(fitting)}"
            )


def check_model(model: ModelConfig, remedy: str) -> None:
    """Raises UsageError where the original's code could not have this shape."""
    fixed = {
        "d_ff": (model.d_ff, 4 * model.d_model),
        "num_heads x head_dim": (model.num_heads * model.head_dim, model.d_model),
        "layer_norm_epsilon": (model.layer_norm_epsilon, 1e-5),
        "rotary_base": (model.rotary_base, 10_000.0),
    }
    for name, (has, needs) in fixed.items():
        if has != needs:
            raise UsageError(
                f"the original's format has no place for {name} {has:g}: its code always has "
                f"{needs:g}; {remedy}"
            )


def _check_count(key: str, value: Any, where: str) -> None:
    least = 0 if key in _MAY_BE_ZERO else 1
    if type(value) is not int or not least <= value <= _MOST:
        raise BadInputError(
            f"{where}: {key} is {value!r}; it should be a whole number from {least}"
        )


def _check_number(key: str, value: Any, where: str) -> None:
    if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
        raise BadInputError(f"{where}: {key} is {value!r}; it should be a number from 0")


def _model(settings: dict[str, Any], where: str) -> ModelConfig:
    for key in (*_SHAPE, "pe_rotary_dims", "seq"):
        if key not in settings:
            raise BadInputError(f"{where} has no {key!r}: give a whole config of the original's")
    if settings["d_model"] % settings["n_heads"]:
        raise BadInputError(
            f"{where}: d_model {settings['d_model']} cannot be cut into {settings['n_heads']} heads"
        )
    try:
        return gpt_j(
            num_layers=settings["layers"],
            d_model=settings["d_model"],
            num_heads=settings["n_heads"],
            head_dim=settings["d_model"] // settings["n_heads"],
            d_ff=4 * settings["d_model"],
            vocab_size=settings["n_vocab"],
            context_length=settings["seq"],
            rotary_dim=settings["pe_rotary_dims"],
            embedding_bias=True,
        )
    except UsageError as error:
        raise BadInputError(f"{where}: {error}") from None
