"""The architectures that are supported: a constructor of configs for each.

GPT-J is the only one today: `ModelConfig` describes the others too, and `check_supported` refuses
them. To add one, in this order:

1. here: its constructor, and its fields in `_FAMILIES`;
2. `params.py`: which parameters its fields imply (norms, biases, positions, a tied head) and their
   initial values;
3. `transformer.py`, `cache.py`, `ops/`: what its fields compute (residual, activation, windows and
   scale of attention), each beside its plain reference;
4. `planning/work.py` and `planning/memory.py`: the formulas for what 3. adds;
5. `conversion/hf/`: a module like `gptj.py` with its config and its table of tensors, and the
   choice by `model_type` in `config.py`, `source.py` and `target.py`;
   `conversion/proof/reference.py`: its own forward pass, which computes the certificate;
6. `presets.py`: the named models.

Shapes, shardings, int8, FLOPs, bytes and checkpoints follow from `params.weight_table`.
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
# Architecture fields, by family.
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
        UsageError: no supported family has these values; the message names the first field that
            differs from the closest family.
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
        BadInputError: a key is unknown or missing, or a value is of another type or out of range.
        UsageError: the architecture is not supported.
    """
    config = from_dict(ModelConfig, upgrade_record(record), where)
    check_supported(config)
    return config


def upgrade_record(record: Any) -> Any:
    """Returns a format-1 record with the fields of today; any other value unchanged.

    Records carry no version. One of format 1 has none of the architecture's fields, and says by
    `embedding_bias` whether there is that bias.
    """
    if not isinstance(record, dict) or _GPT_J.keys() & record.keys():
        return record
    has_bias = record.get(_FORMAT_1_EMBEDDING_BIAS, False)
    if not isinstance(has_bias, bool):
        return record
    sizes = {key: value for key, value in record.items() if key != _FORMAT_1_EMBEDDING_BIAS}
    biases = ("embedding", *_GPT_J["biases"]) if has_bias else _GPT_J["biases"]
    return sizes | _GPT_J | {"biases": biases}
