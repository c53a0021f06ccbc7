"""Which architectures are supported, records of format 1, and the table of weights."""

from __future__ import annotations

import dataclasses

import pytest

from meshlm.checkpoint import format_1
from meshlm.core.config import to_dict
from meshlm.core.errors import BadInputError, UsageError
from meshlm.model.families import check_supported, model_from_record, with_embedding_bias
from meshlm.model.flops import matmul_params
from meshlm.model.params import layer_table, weight_table, weight_tree
from meshlm.model.presets import PRESETS, name_of
from tiny import CONFIG

WITH_BIAS = with_embedding_bias(CONFIG)
# As the code before format 2 wrote it.
RECORD = {
    "num_layers": 2,
    "d_model": 24,
    "num_heads": 4,
    "head_dim": 6,
    "d_ff": 40,
    "vocab_size": 48,
    "context_length": 32,
    "rotary_dim": 4,
    "layer_norm_epsilon": 1e-5,
    "rotary_base": 10_000.0,
}


@pytest.mark.parametrize("config", [*PRESETS.values(), CONFIG, WITH_BIAS], ids=name_of)
def test_every_gpt_j_is_supported(config):
    check_supported(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual", "serial"),
        ("norms", "separate"),
        ("windows", (None, 256)),
        ("attention_scale", 1.0),
        ("attention_scale_by_layer", True),
        ("activation", "gelu"),
        ("biases", ("qkv", "feed_forward", "head")),
        ("tied_head", True),
    ],
)
def test_other_architectures_are_refused_before_anything_is_computed(field, value):
    config = dataclasses.replace(CONFIG, **{field: value})
    for use in (check_supported, weight_tree):
        with pytest.raises(UsageError, match=f"^{field} is .*: GPT-J has .* is supported$"):
            use(config)


def test_learned_positions_have_no_rotary_dims():
    with pytest.raises(UsageError, match="rotary_dim is 4: give 0 where positions are learned"):
        dataclasses.replace(CONFIG, positions="learned")
    learned = dataclasses.replace(CONFIG, positions="learned", rotary_dim=0)
    with pytest.raises(UsageError, match=r"^positions is 'learned': GPT-J has 'rotary'"):
        check_supported(learned)


def test_biases_have_one_order():
    for wrong in (("head", "feed_forward"), ("head", "head"), ("key",)):
        with pytest.raises(UsageError, match=r"^biases is "):
            dataclasses.replace(CONFIG, biases=wrong)


@pytest.mark.parametrize("bias", [False, True])
def test_a_record_of_format_1_is_a_gpt_j(bias):
    wanted = with_embedding_bias(CONFIG, bias)
    assert model_from_record(RECORD | {"embedding_bias": bias}, "config.json") == wanted
    assert model_from_record(to_dict(wanted), "config.json") == wanted


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "config.json is list, not an object"),
        (RECORD | {"layers": 3}, "config.json has an unknown setting 'layers'"),
        (RECORD | {"embedding_bias": 1}, "unknown setting 'embedding_bias'"),
        (RECORD | {"embedding_bias": "true"}, "unknown setting 'embedding_bias'"),
        (RECORD | {"embedding_bias": None}, "unknown setting 'embedding_bias'"),
        (to_dict(CONFIG) | {"embedding_bias": True}, "unknown setting 'embedding_bias'"),
        ({n: v for n, v in to_dict(CONFIG).items() if n != "norms"}, "`norms`"),
    ],
)
def test_what_is_no_record_is_refused(record, message):
    with pytest.raises(BadInputError, match=message):
        model_from_record(record, "config.json")


def test_the_table_is_made_once_a_config():
    assert weight_table(CONFIG) is weight_table(dataclasses.replace(CONFIG))
    assert weight_tree(CONFIG) is weight_tree(dataclasses.replace(CONFIG))


def test_a_layers_weights_are_the_stacked_ones_without_the_dim_of_layers():
    stacked = weight_table(CONFIG)
    for name, weight in layer_table(CONFIG).items():
        whole = stacked[f"blocks.{name}"]
        assert (CONFIG.num_layers, *weight.shape) == whole.shape
        assert ("layers", *weight.dims) == whole.dims


def test_weights_are_drawn_by_their_names_in_format_1():
    table = weight_table(WITH_BIAS)
    assert {weight.draw_name: name for name, weight in table.items()} == format_1.PARAMETERS


@pytest.mark.parametrize("prefix", ["params.", "optimizer.adam.mu.", "optimizer.adafactor.v_row."])
def test_names_of_format_1_are_renamed_in_every_slot(prefix):
    for old, new in format_1.PARAMETERS.items():
        assert format_1.to_current(prefix + old) == prefix + new
        assert format_1.to_format_1(prefix + new) == prefix + old
    old, new = "mu.blocks.12.ff_out_bias", "mu.blocks.12.feed_forward.down.bias"
    assert (format_1.to_current(old), format_1.to_format_1(new)) == (new, old)


@pytest.mark.parametrize("name", ["step", "skipped", "optimizer.adam.count", "recent_losses"])
def test_other_names_stay(name):
    assert format_1.to_current(name) == format_1.to_format_1(name) == name


def test_every_weight_is_looked_up_multiplied_or_added():
    for name, weight in weight_table(WITH_BIAS).items():
        assert (weight.contract > 0) == ("product" in weight.uses), name
        assert weight.decay == (weight.uses != {"vector"}), name
    # 28 layers of 12 x 4096^2, and the head.
    assert matmul_params(PRESETS["gpt-j-6b"]) == 28 * 12 * 4096**2 + 50_400 * 4096
