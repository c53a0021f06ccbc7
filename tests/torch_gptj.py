"""The same weights in transformers' GPTJForCausalLM and here, for the tests that need torch."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

from meshlm.core.tree import from_named, to_named
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.params import Params

LAYER_NAMES = {
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
OUTER_NAMES = {
    "embedding.tokens": "transformer.wte.weight",
    "final_norm.scale": "transformer.ln_f.weight",
    "final_norm.offset": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
    "head.bias": "lm_head.bias",
}


def hf_config(config: ModelConfig) -> transformers.GPTJConfig:
    return transformers.GPTJConfig(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        rotary_dim=config.rotary_dim,
        n_inner=config.d_ff,
        layer_norm_epsilon=config.layer_norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )


def to_torch(params: Params, config: ModelConfig) -> transformers.GPTJForCausalLM:
    model = transformers.GPTJForCausalLM(hf_config(config)).float()
    weights, named = {}, to_named(params)
    for name, theirs in OUTER_NAMES.items():
        weights[theirs] = np.asarray(named[name])
    for name, theirs in LAYER_NAMES.items():
        for layer, value in enumerate(np.asarray(named[f"blocks.{name}"])):
            weights[f"transformer.h.{layer}.{theirs}"] = value
    own = dict(model.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            assert parameter.numel() == weights[name].size, name
            parameter.copy_(torch.from_numpy(weights[name].reshape(parameter.shape).copy()))
    return model.eval()


def from_torch(tensors: dict[str, torch.Tensor], like: Params) -> Params:
    """A tree like `like` from torch's parameters or gradients."""
    layers = like.blocks.attention_norm.scale.shape[0]
    named = {}
    for name, value in to_named(like).items():
        field = name.removeprefix("blocks.")
        if field in OUTER_NAMES:
            rows = tensors[OUTER_NAMES[field]].detach().numpy()
        else:
            theirs = [tensors[f"transformer.h.{i}.{LAYER_NAMES[field]}"] for i in range(layers)]
            rows = np.stack([tensor.detach().numpy() for tensor in theirs])
        named[name] = rows.reshape(value.shape).copy()
    return from_named(like, named)


@st.composite
def shapes(draw) -> ModelConfig:
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 8)) * 2
    return gpt_j(
        num_layers=draw(st.integers(1, 3)),
        d_model=heads * head_dim,  # transformers knows no other
        num_heads=heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        d_ff=draw(st.integers(3, 50)),
        vocab_size=2 * draw(st.integers(3, 40)) + 1,
        context_length=24,
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
    )


def as_torch(tokens) -> torch.Tensor:
    return torch.from_numpy(np.array(tokens)).long()
