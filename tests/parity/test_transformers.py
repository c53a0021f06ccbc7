"""The same weights in transformers' GPTJForCausalLM, in torch on a CPU in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.core.tree import from_named, to_named
from meshlm.model.config import PRESETS, ModelConfig
from meshlm.model.params import Params, count_params
from meshlm.model.transformer import forward
from meshlm.optim import OptimizerConfig
from meshlm.step import StepBatch, compile_train_step, init_state, loss_and_grads
from tiny import F32, assert_trees_close, draw_params, draw_tokens, relative_max, step_config

pytestmark = pytest.mark.parity

LAYER_NAMES = {
    "norm_scale": "ln_1.weight",
    "norm_offset": "ln_1.bias",
    "query": "attn.q_proj.weight",
    "key": "attn.k_proj.weight",
    "value": "attn.v_proj.weight",
    "attention_out": "attn.out_proj.weight",
    "ff_in": "mlp.fc_in.weight",
    "ff_in_bias": "mlp.fc_in.bias",
    "ff_out": "mlp.fc_out.weight",
    "ff_out_bias": "mlp.fc_out.bias",
}
OUTER_NAMES = {
    "embedding": "transformer.wte.weight",
    "final_norm_scale": "transformer.ln_f.weight",
    "final_norm_offset": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
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
    weights = {}
    for name, theirs in OUTER_NAMES.items():
        weights[theirs] = np.asarray(getattr(params, name))
    for name, theirs in LAYER_NAMES.items():
        for layer, value in enumerate(np.asarray(getattr(params.blocks, name))):
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
    layers = like.blocks.norm_scale.shape[0]
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
    return ModelConfig(
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


def torch_loss(model, tokens, targets) -> torch.Tensor:
    logits = model(as_torch(tokens)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), as_torch(targets).flatten())


@settings(max_examples=5)
@given(config=shapes(), rows=st.integers(1, 3), length=st.integers(2, 16), seed=st.integers(0, 99))
def test_logits_and_gradients(config, rows, length, seed):
    params = draw_params(config, seed, scale=0.2)
    tokens, targets = (draw_tokens(config, rows, length, seed + i) for i in (0, 1))
    model = to_torch(params, config)

    with torch.no_grad():
        theirs = model(as_torch(tokens)).logits.numpy()
    torch_loss(model, tokens, targets).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    batch = StepBatch(
        tokens=tokens, targets=targets, loss_mask=jnp.ones(tokens.shape), segment_ids=None
    )
    step = step_config(config)

    @jax.jit
    def logits_and_grads(params, batch):
        grads = loss_and_grads(params, batch, step)[1]
        return forward(params, config, batch.tokens, F32), grads

    ours, grads = logits_and_grads(params, batch)
    assert relative_max(ours, theirs) <= 2e-5
    assert_trees_close(grads, from_torch(gradients, params), 1e-4)


CONFIG = ModelConfig(
    num_layers=2,
    d_model=32,
    num_heads=4,
    head_dim=8,
    d_ff=56,
    vocab_size=77,
    context_length=16,
    rotary_dim=6,
)


def test_ten_steps_of_adamw():
    optimizer = OptimizerConfig(
        learning_rate=3e-3, end_learning_rate=3e-4, warmup_steps=3, anneal_steps=6
    )
    config = step_config(CONFIG, optimizer=optimizer, accumulate=2)
    params = draw_params(CONFIG, 1, scale=0.2)
    model = to_torch(params, CONFIG)
    flat = [p for n, p in model.named_parameters() if "bias" in n or "ln_" in n]
    matrices = [p for n, p in model.named_parameters() if not ("bias" in n or "ln_" in n)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)

    state = jax.jit(lambda: init_state(config, 0))()
    state = dataclasses.replace(state, params=jax.tree.map(jnp.array, params))
    step = compile_train_step(config)
    norms = []
    for number in range(10):
        tokens, targets = (draw_tokens(CONFIG, 4, 16, 2 * number + i) for i in (0, 1))
        adamw.zero_grad()
        loss = torch_loss(model, tokens, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm, past = min(number / 3, 1), min(max(number - 3, 0) / 6, 1)
        rate = warm * 3e-3 - (3e-3 - 3e-4) * (1 - np.cos(np.pi * past)) / 2
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        batch = StepBatch(
            tokens=tokens, targets=targets, loss_mask=jnp.ones(tokens.shape), segment_ids=None
        )
        state, metrics = step(state, batch)
        assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics.grad_norm) == pytest.approx(norm.item(), rel=1e-4)
        assert float(metrics.learning_rate) == pytest.approx(rate, rel=1e-5)
        norms.append(norm.item())
    assert max(norms) > 1  # clipping took part
    theirs = from_torch(dict(model.named_parameters()), params)
    assert_trees_close(state.params, theirs, 1e-4)


@pytest.mark.parametrize("name", ["125m", "gpt-j-6b"])
def test_the_number_of_parameters(name):
    with torch.device("meta"):
        model = transformers.GPTJForCausalLM(hf_config(PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == count_params(PRESETS[name])


def test_gpt_j_6b_has_the_shape_that_transformers_takes_for_granted():
    theirs, ours = transformers.GPTJConfig(), PRESETS["gpt-j-6b"]
    assert theirs.vocab_size == ours.vocab_size
    assert theirs.n_embd == ours.d_model == ours.num_heads * ours.head_dim
    assert (theirs.n_layer, theirs.n_head) == (ours.num_layers, ours.num_heads)
    assert (theirs.n_positions, theirs.rotary_dim) == (ours.context_length, ours.rotary_dim)
    assert theirs.layer_norm_epsilon == ours.layer_norm_epsilon
