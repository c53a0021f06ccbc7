"""GPT-J in transformers: what its config.json says, and which tensors its files hold.

To add a family, write such a module for it, and let `config.py` and `source.py` choose between them
by `model_type`.

Weights are [out, in] as in MeshLM. The dims of the heads are folded into one another.

Dim letters: D model, N heads, H head dim.

Source: transformers 5.23, models/gptj/configuration_gptj.py and modeling_gptj.py.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshlm.conversion.hf.json_files import bad_config, show
from meshlm.conversion.layout import Rearranged
from meshlm.conversion.table import Row, Table
from meshlm.core.errors import UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j

MODEL_TYPE = "gptj"
# A model that was saved for another task has another head, or none.
ARCHITECTURES = {"GPTJForCausalLM", "FlaxGPTJForCausalLM", "TFGPTJForCausalLM", "GPTJModel"}

ROTARY_BASE = 10_000.0
"""The one base that transformers has for GPT-J."""

# What transformers takes where the key is left out.
_SHAPE: dict[str, Any] = {
    "vocab_size": 50_400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
}
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_MAX_SIZE = 1 << 31
_MAX_LAYERS = 10_000

# The values at which a key that can change the numbers changes nothing: the tanh GELU by all its
# names, and what the GPT-2 family and the rotary models have beside GPT-J.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
    "add_cross_attention": (False,),
    "auto_map": (None, {}),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "layer_types": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "reorder_and_upcast_attn": (False,),
    "rope_parameters": (
        None,
        {},
        {"rope_type": "default"},
        {"rope_theta": ROTARY_BASE, "rope_type": "default"},
    ),
    "rope_scaling": (None,),
    "rope_theta": (ROTARY_BASE,),
    "rotary": (True,),
    "rotary_emb_base": (ROTARY_BASE,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (False,),
}

PREFIX = "transformer."
HEAD_PREFIX = "lm_head."

_VECTOR = Rearranged("D -> D")
_MATRIX = Rearranged("out in -> out in")
_TO_HEADS = Rearranged("N H D -> (N H) D")
_FROM_HEADS = Rearranged("D N H -> D (N H)")

_H, _B = f"{PREFIX}h.{{layer}}.", "blocks.{layer}."

TABLE = Table(
    Row(f"{PREFIX}wte.weight", "embedding.tokens", _MATRIX),
    Row(f"{_H}ln_1.weight", f"{_B}attention_norm.scale", _VECTOR),
    Row(f"{_H}ln_1.bias", f"{_B}attention_norm.offset", _VECTOR),
    Row(f"{_H}attn.q_proj.weight", f"{_B}attention.query.weight", _TO_HEADS),
    Row(f"{_H}attn.k_proj.weight", f"{_B}attention.key.weight", _TO_HEADS),
    Row(f"{_H}attn.v_proj.weight", f"{_B}attention.value.weight", _TO_HEADS),
    Row(f"{_H}attn.out_proj.weight", f"{_B}attention.out.weight", _FROM_HEADS),
    Row(f"{_H}mlp.fc_in.weight", f"{_B}feed_forward.up.weight", _MATRIX),
    Row(f"{_H}mlp.fc_in.bias", f"{_B}feed_forward.up.bias", _VECTOR),
    Row(f"{_H}mlp.fc_out.weight", f"{_B}feed_forward.down.weight", _MATRIX),
    Row(f"{_H}mlp.fc_out.bias", f"{_B}feed_forward.down.bias", _VECTOR),
    Row(f"{PREFIX}ln_f.weight", "final_norm.scale", _VECTOR),
    Row(f"{PREFIX}ln_f.bias", "final_norm.offset", _VECTOR),
    Row(f"{HEAD_PREFIX}weight", "head.weight", _MATRIX),
    Row(f"{HEAD_PREFIX}bias", "head.bias", _VECTOR),
    added={"embedding.bias": "embedding.tokens"},
)

# What old versions saved beside the weights: the causal mask, and tables that follow from the
# config. Nothing is learned in them.
_BUFFER = re.compile(
    rf"{re.escape(PREFIX)}h\.(0|[1-9][0-9]{{0,4}})\.attn\."
    r"(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)"
)


def pop_model(path: Path, config: dict[str, Any]) -> ModelConfig:
    """Takes the keys of the shape out of a config.json, and returns the model that they describe.

    Args:
        path: the file, for messages.

    Raises:
        BadInputError: transformers' GPT-J cannot have this shape.
    """
    for alias, name in _ALIASES.items():
        if alias in config:
            value = config.pop(alias)
            if config.setdefault(name, value) != value:
                raise bad_config(path, f"{alias} and {name} differ: delete the wrong one")
    shape = {name: config.pop(name, default) for name, default in _SHAPE.items()}
    model = _to_model(path, shape)
    # Written by other programs: it must be what GPT-J's is, all heads sharing d_model.
    if config.pop("head_dim", model.head_dim) != model.head_dim:
        raise bad_config(
            path, "head_dim is not n_embd / n_head, which transformers' GPT-J cannot have"
        )
    return model


def make_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the keys of a config.json for this shape, without those of special tokens.

    Raises:
        UsageError: the shape is not one that transformers' GPT-J can have.
    """
    if model.rotary_base != ROTARY_BASE:
        raise UsageError(
            f"rotary_base is {model.rotary_base}: transformers' GPT-J has {ROTARY_BASE} only, and "
            "its config.json has no key for it; convert --to meshlm"
        )
    if model.head_dim * model.num_heads != model.d_model:
        raise UsageError(
            f"{model.num_heads} heads of {model.head_dim} are not d_model ({model.d_model}), as "
            "transformers' GPT-J needs; convert --to meshlm"
        )
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPTJForCausalLM"],
        "attn_pdrop": 0.0,
        "dtype": dtype,
        "embd_pdrop": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": model.layer_norm_epsilon,
        "model_type": MODEL_TYPE,
        "n_embd": model.d_model,
        "n_head": model.num_heads,
        "n_inner": None if model.d_ff == 4 * model.d_model else model.d_ff,
        "n_layer": model.num_layers,
        "n_positions": model.context_length,
        "resid_pdrop": 0.0,
        "rotary": True,
        "rotary_dim": model.rotary_dim,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def is_buffer(name: str, num_layers: int) -> bool:
    """Whether a tensor, by its full name, is one that can be ignored."""
    found = _BUFFER.fullmatch(name)
    return found is not None and int(found[1]) < num_layers


def _to_model(path: Path, shape: Mapping[str, Any]) -> ModelConfig:
    for name, value in shape.items():
        if name == "n_inner" and value is None:
            continue
        if name == "layer_norm_epsilon":
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise bad_config(path, f"{name} is {show(value)}, not a positive number")
        elif type(value) is not int or not 0 < value < _MAX_SIZE:
            raise bad_config(path, f"{name} is {show(value)}, not a positive whole number")
    if shape["n_layer"] > _MAX_LAYERS:
        raise bad_config(path, f"n_layer is {shape['n_layer']}, over {_MAX_LAYERS}")
    width, heads, rotary_dim = shape["n_embd"], shape["n_head"], shape["rotary_dim"]
    if width % heads:
        raise bad_config(path, f"n_head is {heads}, which does not divide n_embd ({width})")
    if rotary_dim % 2 or rotary_dim > width // heads:
        raise bad_config(
            path,
            f"rotary_dim is {rotary_dim}: it must be even and at most n_embd / n_head "
            f"({width // heads})",
        )
    return gpt_j(
        num_layers=shape["n_layer"],
        d_model=width,
        num_heads=heads,
        head_dim=width // heads,
        d_ff=shape["n_inner"] or 4 * width,
        vocab_size=shape["vocab_size"],
        context_length=shape["n_positions"],
        rotary_dim=rotary_dim,
        layer_norm_epsilon=float(shape["layer_norm_epsilon"]),
    )
