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

from meshlm.model.families import gpt_j
from meshlm.model.params import count_params
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import forward
from meshlm.optim import OptimizerConfig
from meshlm.step import StepBatch, compile_train_step, init_state, loss_and_grads
from tiny import F32, assert_trees_close, draw_params, draw_tokens, relative_max, step_config
from torch_gptj import as_torch, from_torch, hf_config, shapes, to_torch

pytestmark = pytest.mark.parity


def torch_loss(model, tokens, targets) -> torch.Tensor:
    logits = model(as_torch(tokens)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), as_torch(targets).flatten())


CASES = {
    "config": shapes(),
    "rows": st.integers(1, 3),
    "length": st.integers(2, 16),
    "seed": st.integers(0, 99),
}


@settings(max_examples=5)
@given(**CASES)
def test_logits_and_gradients(config, rows, length, seed):
    check_logits_and_gradients(config, rows, length, seed)


@pytest.mark.long
# With two or four dims a norm gives -1 and 1 alone: gradients through it are rounding and no more.
@settings(max_examples=40, derandomize=True)
@given(**CASES | {"config": shapes().filter(lambda config: config.d_model >= 8)})
def test_logits_and_gradients_of_many_shapes(config, rows, length, seed):
    check_logits_and_gradients(config, rows, length, seed)


def check_logits_and_gradients(config, rows, length, seed):
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_agree_where_there_is_text(side):
    """transformers takes rows of different lengths padded; each is that row alone here."""
    params, lengths, width = draw_params(CONFIG, 3, scale=0.2), (16, 9, 3), 16
    model = to_torch(params, CONFIG)
    tokens = np.array(draw_tokens(CONFIG, 3, width, 5))
    mask = np.zeros((3, width), np.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, None) if side == "left" else slice(length)] = 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        theirs = model(
            as_torch(tokens), attention_mask=as_torch(mask), position_ids=as_torch(positions)
        ).logits.numpy()
    for row in range(3):
        real = mask[row] == 1
        ours = forward(params, CONFIG, jnp.asarray(tokens[row][real][None]), F32)[0]
        assert relative_max(ours, theirs[row][real]) <= 2e-5


CONFIG = gpt_j(
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
