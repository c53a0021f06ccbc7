"""The record of a run that begins: its options, and what follows where one is left out."""

import dataclasses
from typing import Any

from meshlm.core.errors import UsageError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias
from meshlm.model.params import count_params, weight_table
from meshlm.model.presets import find_preset, name_of, vocab_rows
from meshlm.optim import OptimizerConfig
from meshlm.training.config import Origin, RunConfig, StoreRecord, TrainConfig

_DEFAULTS: dict[str, Any] = {
    "preset": "demo",
    "steps": 1000,
    "batch_size": 8,
    "seed": 0,
    "document_mask": False,
    "accumulate": 1,
    "z_loss": 0.0,
    "skip_spikes": None,
    "compute_dtype": "bfloat16",
}
# What a recipe has in place of these. Its weights are rounded, so its products need not be.
_RECIPES: dict[str, dict[str, Any]] = {"mtj-2021": {"z_loss": 1e-4, "compute_dtype": "float32"}}
_RECIPE_SHARDS = 8  # those of the released run
# Parameters without embedding and head up to which a peak learning rate is the default. From 125M
# on they are GPT-3's (Brown et al. 2020, table 2.1), and GPT-J's own at 6B.
_PEAK_RATES = ((2e7, 2e-3), (2e8, 6e-4), (5e8, 3e-4), (2e9, 2e-4), (4e9, 1.6e-4), (1e10, 1.2e-4))


def new_run(
    config: TrainConfig,
    stores: tuple[StoreRecord, ...],
    tokenizer: str,
    tokenizer_size: int,
    *,
    model: ModelConfig | None = None,
    origin: Origin | None = None,
    special_tokens: SpecialTokens | None = None,
) -> RunConfig:
    """Returns the record of a run that begins.

    Args:
        model: the shape of the weights to begin with, or of the configuration file.
        origin: where those weights come from.
        special_tokens: of those weights and of the stores.

    Raises:
        UsageError: an option does not fit the others.
    """
    if config.recipe_shards is not None and config.recipe is None:
        raise UsageError("--recipe-shards is for a --recipe: give --recipe mtj-2021 with it")
    given = _given(config, _DEFAULTS | _RECIPES.get(config.recipe or "", {}))
    model = _model(config, given, model, tokenizer_size)
    given["preset"] = name_of(model)
    if origin is not None and origin.goes_on and given["steps"] <= (origin.step or 0):
        raise UsageError(
            f"--steps {given['steps']}: {origin.path} is at step {origin.step:,} already: give more"
        )
    seq_len = config.seq_len or model.context_length
    if seq_len > model.context_length:
        raise UsageError(
            f"--seq-len {seq_len} is longer than the context of {given['preset']}: "
            f"give {model.context_length} or less"
        )
    return RunConfig(
        model=model,
        optimizer=_new_optimizer(config, model, given["steps"], origin),
        data=stores,
        tokenizer=tokenizer,
        seq_len=seq_len,
        origin=origin,
        recipe=config.recipe,
        special_tokens=special_tokens,
        **given,
    )


def _model(
    config: TrainConfig, given: dict[str, Any], model: ModelConfig | None, tokenizer_size: int
) -> ModelConfig:
    if model is None:
        preset = find_preset(given["preset"])
        model = dataclasses.replace(preset, vocab_size=vocab_rows(tokenizer_size))
        vocab_size = config.vocab_size or model.vocab_size
    else:
        _check_shape(config, model)
        vocab_size = model.vocab_size
    if vocab_size < tokenizer_size:
        raise UsageError(
            f"--vocab-size {vocab_size} is less than the {tokenizer_size} tokens of the data's "
            f"tokenizer: give {vocab_rows(tokenizer_size)}"
        )
    # The original has this bias, and its summed biases are what the recipe is about.
    bias = model.has_bias("embedding") or config.recipe is not None
    return with_embedding_bias(dataclasses.replace(model, vocab_size=vocab_size), bias)


def _check_shape(config: TrainConfig, model: ModelConfig) -> None:
    """Raises UsageError where an option asks for another shape than that of the weights."""
    if config.preset is not None:
        find_preset(config.preset)
        if name_of(model) != config.preset:
            raise UsageError(
                f"--preset {config.preset}: the weights have {model.num_layers} layers of "
                f"{model.d_model} and are {name_of(model)}: leave it out"
            )
    if config.vocab_size not in (None, model.vocab_size):
        raise UsageError(
            f"--vocab-size {config.vocab_size}: the weights have {model.vocab_size} rows: "
            "leave it out"
        )


# What a run that goes on compares with its record.
RUN_OPTIONS = (*_DEFAULTS, "recipe")


def _given(config: TrainConfig, defaults: dict[str, Any]) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in values.items()}


_VOCABULARY = ("embedding.tokens", "head.weight")


def _new_optimizer(
    config: TrainConfig, model: ModelConfig, steps: int, origin: Origin | None
) -> OptimizerConfig:
    name = config.optimizer or "adamw"
    if name != "adamw" and (config.recipe is not None or (origin and origin.goes_on)):
        given = "--resume-from" if config.recipe is None else f"--recipe {config.recipe}"
        raise UsageError(f"--optimizer {name}: {given} needs adamw: leave one of them out")
    weights = weight_table(model)
    inner = count_params(model) - sum(weights[name].size for name in _VOCABULARY if name in weights)
    peak = config.learning_rate
    if peak is None:
        peak = next((rate for limit, rate in _PEAK_RATES if inner <= limit), 1e-4)
    warmup = min(3000, steps // 20) if config.warmup_steps is None else config.warmup_steps
    derived = {
        "learning_rate": peak,
        "end_learning_rate": peak / 10,
        "warmup_steps": warmup,
        "anneal_steps": max(1, steps - warmup),
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    }
    shares = 1
    if config.recipe is not None:
        shares = config.recipe_shards or (origin and origin.shards) or _RECIPE_SHARDS
    return OptimizerConfig(name=name, **_given(config, derived), bias_shares=shares)
