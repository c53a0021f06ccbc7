"""What the numerics profiles promise, each against what it is named after."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch

import gptj_float64
from meshlm.core.tree import cast_floating
from meshlm.generation.profiles import numerics
from meshlm.model.families import gpt_j
from meshlm.model.transformer import forward
from tiny import CONFIG, draw_params, draw_tokens, relative_l2, relative_max
from torch_gptj import as_torch, to_torch

pytestmark = pytest.mark.parity

WIDE = gpt_j(
    num_layers=4,
    d_model=128,
    num_heads=2,
    head_dim=64,
    d_ff=512,
    vocab_size=256,
    context_length=64,
    rotary_dim=32,
)
LONG = dataclasses.replace(
    WIDE, num_layers=1, d_model=64, head_dim=32, d_ff=80, rotary_dim=16, context_length=3000
)


def logits_of(params, config, tokens, profile, dtype):
    chosen = numerics(profile, dtype, "float32")
    weights = params if chosen.weights is None else cast_floating(params, chosen.weights)
    return np.asarray(
        jax.jit(lambda w, t: forward(w, config, t, chosen.compute))(weights, tokens)[0]
    )


def test_long_contexts_in_float32():
    """transformers' rotary table ends where its n_positions does."""
    params, tokens = draw_params(LONG, 2, scale=0.1), draw_tokens(LONG, 1, LONG.context_length, 1)
    with torch.no_grad():
        theirs = to_torch(params, LONG)(as_torch(tokens)).logits[0].numpy()
    for profile in ("fast", "hf"):
        assert relative_max(logits_of(params, LONG, tokens, profile, "float32"), theirs) <= 2e-5


def test_hf_rounds_as_transformers_does():
    """Where bfloat16 rounds decides more than how products are summed."""
    params, tokens = draw_params(WIDE, 1, scale=0.08), draw_tokens(WIDE, 1, 48)
    with torch.no_grad():
        theirs = to_torch(params, WIDE).bfloat16()(as_torch(tokens)).logits[0].float().numpy()
    distance = {
        profile: relative_l2(logits_of(params, WIDE, tokens, profile, "bfloat16"), theirs)
        for profile in ("hf", "fast", "mtj-2021")
    }
    assert distance["hf"] < 0.6 * distance["fast"]
    assert distance["hf"] < 0.6 * distance["mtj-2021"]


def test_one_block_of_hf_is_transformers_bit_for_bit():
    """Before differences have grown, nearly every logit is the same bfloat16 number."""
    config = dataclasses.replace(WIDE, num_layers=1)
    params, tokens = draw_params(config, 4, scale=0.08), draw_tokens(config, 1, 32)
    with torch.no_grad():
        theirs = to_torch(params, config).bfloat16()(as_torch(tokens)).logits[0].float().numpy()
    same = {
        profile: np.mean(logits_of(params, config, tokens, profile, "bfloat16") == theirs)
        for profile in ("hf", "fast")
    }
    assert same["hf"] > 0.9 > 0.1 > same["fast"]


def test_mtj_2021_is_float32_over_rounded_weights():
    params, tokens = draw_params(CONFIG, 5), draw_tokens(CONFIG, 2, 20)
    rounded = cast_floating(cast_floating(params, "bfloat16"), "float32")
    exact = gptj_float64.forward(rounded, CONFIG, tokens)[0]
    found = logits_of(params, CONFIG, tokens, "mtj-2021", None)
    assert relative_max(found, exact) <= 2e-5
    # The rounding is there: unrounded weights give other numbers.
    assert relative_max(gptj_float64.forward(params, CONFIG, tokens)[0], exact) > 1e-3
