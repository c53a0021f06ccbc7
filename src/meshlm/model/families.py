"""The architectures that are supported: a constructor of configs for each.

To add one, write its constructor here, list what it decides in `_FAMILIES`, and give it a table of
names in `conversion/`. Everything else follows from the config (`params.weight_table`).
"""

import dataclasses
from typing import Any

from meshlm.core.config import from_dict
from meshlm.core.errors import UsageError
from meshlm.model.config import ModelConfig

_GPT_J: dict[str, Any] = {
    "positions": "rotary",
    "residual": "parallel",
    "norms": "shared",
    "windows": (None,),
    "attention_scale": None,
    "attention_scale_by_layer": False,
    "activation": "gelu_tanh",
    "biases": ("feed_forward", "head"),
    "tied_head": False,
}
# The fields of each supported architecture that are no sizes.
_FAMILIES = {"GPT-J": _GPT_J}
# In records of format 1, which knows GPT-J alone.
_FORMAT_1_EMBEDDING_BIAS = "embedding_bias"


def gpt_j(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    head_dim: int,
    d_ff: int,
    vocab_size: int,
    context_length: int,
    rotary_dim: int,
    layer_norm_epsilon: float = 1e-5,
    rotary_base: float = 10_000.0,
    embedding_bias: bool = False,
) -> ModelConfig:
    """Returns the config of a GPT-J; `ModelConfig` describes the sizes.

    Args:
        embedding_bias: as `with_embedding_bias`.
    """
    config = ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        vocab_size=vocab_size,
        context_length=context_length,
        rotary_dim=rotary_dim,
        layer_norm_epsilon=layer_norm_epsilon,
        rotary_base=rotary_base,
        **_GPT_J,
    )
    return with_embedding_bias(config, embedding_bias)


def with_embedding_bias(config: ModelConfig, present: bool = True) -> ModelConfig:
    """Returns the config with or without a vector that is added to every embedding.

    GPT-J has it in mesh-transformer-jax's checkpoints. Hugging Face's have it in the table.
    """
    others = tuple(name for name in config.biases if name != "embedding")
    return dataclasses.replace(config, biases=("embedding", *others) if present else others)


def check_supported(config: ModelConfig) -> None:
    """Checks that the architecture is a supported one, whatever its sizes.

    Raises:
        UsageError: it is none; the first field that differs from the nearest one is named.
    """
    plain = with_embedding_bias(config, False)
    differences = [
        [
            (name, field, wanted)
            for field, wanted in fields.items()
            if getattr(plain, field) != wanted
        ]
        for name, fields in _FAMILIES.items()
    ]
    nearest = min(differences, key=len)
    if nearest:
        name, field, wanted = nearest[0]
        raise UsageError(
            f"{field} is {getattr(config, field)!r}: {name} has {wanted!r}, and no architecture "
            "with other values is supported"
        )


def model_from_record(record: Any, where: str) -> ModelConfig:
    """Returns the config in a checkpoint's or a run's record (JSON values), of any format version.

    Args:
        where: the record's file and key, for messages.

    Raises:
        BadInputError: a key is unknown or missing, or a value is of another type.
        UsageError: a value is out of range, or the architecture is not supported.
    """
    config = from_dict(ModelConfig, upgrade_record(record), where)
    check_supported(config)
    return config


def upgrade_record(record: Any) -> Any:
    """Returns a config's record as this version writes it; what is no record of format 1 as is."""
    if not isinstance(record, dict) or _GPT_J.keys() & record.keys():
        return record
    sizes = {key: value for key, value in record.items() if key != _FORMAT_1_EMBEDDING_BIAS}
    biases = _GPT_J["biases"]
    if record.get(_FORMAT_1_EMBEDDING_BIAS) is True:
        biases = ("embedding", *biases)
    return sizes | _GPT_J | {"biases": biases}
