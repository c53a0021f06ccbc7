"""Hugging Face's config.json, read as transformers reads it and written so that it does.

A key that this page does not know is refused: it might change the numbers.

Source: transformers 5.23, models/gptj/configuration_gptj.py and configuration_utils.py.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from meshlm.conversion.hf import gptj
from meshlm.conversion.hf.json_files import bad_config, read_json, show
from meshlm.data.special_tokens import SpecialTokens
from meshlm.model.config import ModelConfig

CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"
_MAX_END_IDS = 1000
_NO_SPECIAL_TOKENS = SpecialTokens()
_SHOWN_KEYS = 30
# Training, tasks, the form of the output, the way it is computed, where a file came from, and what
# other programs keep there for themselves: transformers' GPT-J reads none of them for its numbers.
_HARMLESS = """
    resid_pdrop embd_pdrop attn_pdrop initializer_range gradient_checkpointing
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
    decoder_start_token_id tokenizer_class prefix n_ctx id2label label2id num_labels problem_type
    finetuning_task task_specific_params dtype torch_dtype use_bfloat16 torchscript tf_legacy_loss
    chunk_size_feed_forward is_decoder return_dict use_return_dict output_attentions
    output_hidden_states tie_last_hidden_states attn_implementation _attn_implementation
    _attn_implementation_internal _attn_implementation_autoset _experts_implementation
    _experts_implementation_internal _flash_attn_2_enabled name_or_path _name_or_path _commit_hash
    transformers_version transformers_weights model_max_length tokenizer_name tokenizer_type
    vocab_file merges_file license language tags datasets library_name pipeline_tag
    welcome antemplate newlinemode badwordsids formatoptns nobreakmodel
    unsloth_version unsloth_fixed torch_compile deepspeed
"""
# Defaults of generation, which old versions kept in this file: the attributes of GenerationConfig.
_GENERATION = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config cache_implementation
    compile_config constraints continuous_batching_config disable_compile diversity_penalty
    do_sample dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids
    forced_bos_token_id forced_decoder_ids forced_eos_token_id generation_kwargs guidance_scale
    is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size
    max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate return_legacy_cache sequence_bias speculation_type stop_strings
    suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p typical_p
    use_cache use_mtp watermarking_config _from_model_config
"""
_IGNORED = frozenset((_HARMLESS + _GENERATION).split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfConfig:
    """What config.json says."""

    model: ModelConfig
    tokenizer_class: str | None
    special_tokens: SpecialTokens
    """Its ids alone."""


def read_config(path: Path) -> HfConfig:
    """Returns what a config.json says.

    Raises:
        UsageError: there is no such file.
        BadInputError: it is of another model, or has a key that would change the numbers.
    """
    config = read_json(path)
    kind = config.pop("model_type", None)
    if kind != gptj.MODEL_TYPE:
        raise bad_config(path, f"model_type is {show(kind)}: MeshLM reads {gptj.MODEL_TYPE!r} only")
    _check_architectures(path, config.pop("architectures", None))
    model = gptj.pop_model(path, config)
    _check_neutral(path, config)
    tokenizer_class = config.get("tokenizer_class")
    return HfConfig(
        model=model,
        tokenizer_class=tokenizer_class if isinstance(tokenizer_class, str) else None,
        special_tokens=_special_tokens(path, config),
    )


def read_generation_config(folder: Path, config: SpecialTokens) -> tuple[SpecialTokens, list[str]]:
    """Returns the ids that count when generating, and the other settings that the file has.

    An id of generation_config.json takes the place of that of config.json, as in transformers.

    Raises:
        BadInputError: the file is damaged.
    """
    path = folder / GENERATION_CONFIG_FILE
    if not path.is_file():
        return config, []
    content = read_json(path)
    own = _special_tokens(path, content)
    merged = dataclasses.replace(
        config,
        eos_token_ids=own.eos_token_ids or config.eos_token_ids,
        bos_token_id=config.bos_token_id if own.bos_token_id is None else own.bos_token_id,
        pad_token_id=config.pad_token_id if own.pad_token_id is None else own.pad_token_id,
    )
    known = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
    others = [
        name
        for name, value in content.items()
        if name not in known and not name.startswith("_") and value is not None
    ]
    return merged, others


def id_settings(special_tokens: SpecialTokens) -> dict[str, Any]:
    """Returns the ids by the names that config.json and generation_config.json have for them."""
    ends = special_tokens.eos_token_ids
    settings: dict[str, Any] = {
        "bos_token_id": special_tokens.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
    }
    if special_tokens.pad_token_id is not None:
        settings["pad_token_id"] = special_tokens.pad_token_id
    return settings


def _special_tokens(path: Path, config: Mapping[str, Any]) -> SpecialTokens:
    """Returns the ids that a file declares."""
    ends = config.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    found: dict[str, Any] = {"eos_token_ids": tuple(ids)}
    found |= {name: config.get(name) for name in ("bos_token_id", "pad_token_id")}
    for name, values in (
        ("eos_token_id", ids),
        *((name, [found[name]]) for name in ("bos_token_id", "pad_token_id")),
    ):
        if any(value is not None and type(value) is not int for value in values):
            raise bad_config(path, f"{name} is {show(config[name])}, which is no token id")
    if None in ids:
        raise bad_config(path, f"eos_token_id is {show(ends)}, which is no list of token ids")
    if len(ids) > _MAX_END_IDS:
        raise bad_config(path, f"eos_token_id has {len(ids):,} ids, over {_MAX_END_IDS}")
    return SpecialTokens(**found)


def make_config(
    model: ModelConfig, dtype: str, special_tokens: SpecialTokens = _NO_SPECIAL_TOKENS
) -> dict[str, Any]:
    """Returns a config.json that transformers 4 and 5 read as this shape.

    Raises:
        UsageError: the shape is not one that transformers' GPT-J can have.
    """
    return {**gptj.make_config(model, dtype), **id_settings(special_tokens)}


def _check_architectures(path: Path, names: Any) -> None:
    if names is None:
        return
    if not isinstance(names, list) or not gptj.ARCHITECTURES & {n for n in names if type(n) is str}:
        raise bad_config(path, f"architectures is {show(names)}: MeshLM reads GPTJForCausalLM only")


def _check_neutral(path: Path, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in gptj.NEUTRAL and not _is_among(value, gptj.NEUTRAL[name]):
            wanted = " or ".join(json.dumps(v) for v in gptj.NEUTRAL[name])
            raise bad_config(path, f"{name} is {show(value)}: MeshLM's GPT-J has {wanted} only")
    unknown = [name for name in config if name not in _IGNORED and name not in gptj.NEUTRAL]
    if unknown:
        shown = ", ".join(map(show, unknown[:_SHOWN_KEYS]))
        more = f" and {len(unknown) - _SHOWN_KEYS} more" if len(unknown) > _SHOWN_KEYS else ""
        keys, them = ("is a key", "it") if len(unknown) == 1 else ("are keys", "them")
        raise bad_config(
            path,
            f"{shown}{more} {keys} that MeshLM does not know: delete {them}, unless the model's "
            "numbers depend on it",
        )


def _is_among(value: Any, neutral: Collection[Any]) -> bool:
    # 1 == True and 0 == False in Python, but not in JSON.
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral)
