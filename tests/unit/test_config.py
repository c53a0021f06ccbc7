"""Shapes of models: the published one to the last parameter, the ladder, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.core.errors import UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.params import count_params
from meshlm.model.presets import PRESETS, vocab_rows
from tiny import CONFIG

# Layers, d_model, heads, head dim, rotary dims, context: DESIGN's ladder, by hand.
LADDER = {
    "test": (2, 64, 8, 8, 4, 128),
    "demo": (6, 256, 8, 32, 16, 512),
    "125m": (12, 768, 12, 64, 32, 2048),
    "350m": (24, 1024, 16, 64, 32, 2048),
    "1.3b": (24, 2048, 16, 128, 64, 2048),
    "2.7b": (32, 2560, 20, 128, 64, 2048),
    "gpt-j-6b": (28, 4096, 16, 256, 64, 2048),
    "23b": (28, 8192, 32, 256, 64, 2048),
}


def test_the_ladder():
    found = {
        name: (c.num_layers, c.d_model, c.num_heads, c.head_dim, c.rotary_dim, c.context_length)
        for name, c in PRESETS.items()
    }
    assert found == LADDER


@pytest.mark.parametrize("name", LADDER)
def test_what_all_presets_share(name):
    config = PRESETS[name]
    assert config.d_ff == 4 * config.d_model
    assert config.vocab_size == 50_400
    assert config.layer_norm_epsilon == 1e-5
    assert config.rotary_base == 10_000


def test_gpt_j_6b_has_the_published_number_of_parameters():
    # transformers counts as many in EleutherAI/gpt-j-6b.
    assert count_params(PRESETS["gpt-j-6b"]) == 6_050_882_784


@given(
    layers=st.integers(1, 3),
    d_model=st.integers(1, 20),
    heads=st.integers(1, 5),
    head_dim=st.integers(2, 9),
    d_ff=st.integers(1, 30),
    vocab=st.integers(1, 40),
)
def test_the_number_of_parameters_by_the_formula(layers, d_model, heads, head_dim, d_ff, vocab):
    config = gpt_j(
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        head_dim=head_dim,
        d_ff=d_ff,
        vocab_size=vocab,
        context_length=8,
        rotary_dim=2,
    )
    norm, attention = 2 * d_model, 4 * d_model * heads * head_dim
    feed_forward = 2 * d_model * d_ff + d_ff + d_model
    ends = 2 * vocab * d_model + vocab + norm
    assert count_params(config) == layers * (norm + attention + feed_forward) + ends


@pytest.mark.parametrize(
    ("size", "rows"),
    [(1, 128), (127, 128), (128, 128), (129, 256), (4096, 4096), (50_256, 50_304)],
)
def test_a_vocabulary_is_padded_to_a_multiple_of_128(size, rows):
    assert vocab_rows(size) == rows


def test_gpt2s_vocabulary_has_gpt_js_rows():
    assert vocab_rows(50_257) == 50_400


@given(st.integers(1, 300_000).filter(lambda size: size != 50_257))
def test_padding_is_the_least_that_will_do(size):
    rows = vocab_rows(size)
    assert rows % 128 == 0
    assert size <= rows < size + 128


SIZES = [f.name for f in dataclasses.fields(ModelConfig) if f.type in (int, float)]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_no_size_may_be_zero_negative_or_no_number(name, value):
    with pytest.raises(UsageError, match=rf"^{name} is {value}: give a positive number$"):
        dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.parametrize("rotary_dim", [3, 5, 8, 100])
def test_rotary_dims_are_even_and_fit_the_head(rotary_dim):
    with pytest.raises(UsageError, match=rf"^rotary_dim is {rotary_dim}: .*head_dim \(6\)"):
        dataclasses.replace(CONFIG, rotary_dim=rotary_dim)


def test_the_whole_head_may_be_rotated():
    assert dataclasses.replace(CONFIG, rotary_dim=6).rotary_dim == 6


def test_a_config_is_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        ModelConfig(2, 64, 8, 8, 256, 128, 128, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.d_model = 1
