"""The tensors of transformers' GPT-J: their names and shapes, and which native tensor each is.

Weights are [out, in] in both; only the dims of the heads are folded into one another there.

Source: transformers 5.23, models/gptj/modeling_gptj.py.
"""

import re
from collections.abc import Sequence

from meshlm.conversion.source import PartKey
from meshlm.conversion.table import native_shapes
from meshlm.model.config import ModelConfig

PREFIX = "transformer."
HEAD_PREFIX = "lm_head."

_LAYER = {
    "attention_norm.scale": "ln_1.weight",
    "attention_norm.offset": "ln_1.bias",
    "attention.query.weight": "attn.q_proj.weight",
    "attention.key.weight": "attn.k_proj.weight",
    "attention.value.weight": "attn.v_proj.weight",
    "attention.out.weight": "attn.out_proj.weight",
    "feed_forward.up.weight": "mlp.fc_in.weight",
    "feed_forward.up.bias": "mlp.fc_in.bias",
    "feed_forward.down.weight": "mlp.fc_out.weight",
    "feed_forward.down.bias": "mlp.fc_out.bias",
}
_OUTER = {
    "embedding.tokens": f"{PREFIX}wte.weight",
    "final_norm.scale": f"{PREFIX}ln_f.weight",
    "final_norm.offset": f"{PREFIX}ln_f.bias",
    "head.weight": f"{HEAD_PREFIX}weight",
    "head.bias": f"{HEAD_PREFIX}bias",
}
# What old versions saved beside the weights: the causal mask, and tables that follow from the
# config. Nothing is learned in them.
_BUFFER = re.compile(
    rf"{re.escape(PREFIX)}h\.(0|[1-9][0-9]{{0,4}})\.attn\."
    r"(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)"
)


# What torch puts around a model, by the prefix that it gives the names.
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
_STRANGERS = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"\blora_|\bbase_model\.model\.", "it is PEFT's; call merge_and_unload() and save that"),
        (r"\.(qweight|qzeros|g_idx|scales)$", "GPTQ or AWQ packed it; get the model unquantised"),
        (
            r"\.(SCB|absmax|quant_map|nested_\w+|quant_state\..+|weight_format)$",
            "bitsandbytes packed it; get the model unquantised",
        ),
        (
            rf"\.({re.escape(PREFIX)}(h\.|wte\.|ln_f\.)|{re.escape(HEAD_PREFIX)})",
            "it was saved from inside another module; save GPTJForCausalLM's own state dict",
        ),
    )
)


def hf_name(native: str) -> str:
    """Returns transformers' name of a native tensor."""
    if native in _OUTER:
        return _OUTER[native]
    _, layer, field = native.split(".", 2)
    return f"{PREFIX}h.{layer}.{_LAYER[field]}"


def hf_shapes(model: ModelConfig, key: PartKey) -> dict[str, tuple[int, ...]]:
    """Returns transformers' shape of each of a part's tensors by native name."""
    shapes = native_shapes(model, key)
    shapes.pop("embedding.bias", None)
    return {name: _to_hf_shape(name, shape) for name, shape in shapes.items()}


def full_name(name: str) -> str:
    """Returns the name with its prefix, which a bare GPTJModel is saved without."""
    return name if name.startswith((PREFIX, HEAD_PREFIX)) else PREFIX + name


def wrapper_of(names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the prefix that torch's wrappers gave all names, and the wrappers, outermost first.

    Both are empty where none did. A wrapper computes nothing: the model in it is the same.
    """
    prefix, wrappers = "", []
    while names:
        for own, wrapper in _WRAPPERS.items():
            if all(name.startswith(prefix + own) for name in names):
                prefix += own
                wrappers.append(wrapper)
                break
        else:
            break
    return prefix, wrappers


def why_unknown(name: str) -> str:
    """Returns where a tensor that no GPT-J has comes from, and the remedy; "" if nobody knows."""
    return next((f": {why}" for pattern, why in _STRANGERS if pattern.search(name)), "")


def is_buffer(name: str, num_layers: int) -> bool:
    """Whether a tensor, by its full name, is one that can be ignored."""
    found = _BUFFER.fullmatch(name)
    return found is not None and int(found[1]) < num_layers


def _to_hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith((".query.weight", ".key.weight", ".value.weight")):
        N, H, D = shape
        return N * H, D
    if name.endswith(".attention.out.weight"):
        D, N, H = shape
        return D, N * H
    return shape
