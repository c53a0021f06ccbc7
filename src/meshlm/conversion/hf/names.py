"""What programs put around the names of tensors in a file."""

import re
from collections.abc import Sequence

from meshlm.conversion.hf.gptj import HEAD_PREFIX, PREFIX

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
