"""Floating-point operations by formula, against the published figures."""

import pytest

from meshlm.model.flops import flops_per_token, matmul_params, mfu
from meshlm.model.presets import PRESETS

GPT_J_6B = PRESETS["gpt-j-6b"]


def test_gpt_j_6b():
    # 6,050,882,784 weights in all, less the embedding (50,400 x 4,096), less the biases and
    # norms: per layer a norm's scale and bias, 16,384 and 4,096 biases; at the end a norm's
    # scale and bias and the head's bias.
    vectors = 28 * (2 * 4096 + 16384 + 4096) + 2 * 4096 + 50400
    assert matmul_params(GPT_J_6B) == 6_050_882_784 - 50400 * 4096 - vectors
    assert matmul_params(GPT_J_6B) == pytest.approx(5.844e9, rel=1e-4)

    without_attention = flops_per_token(GPT_J_6B, 0)
    assert without_attention == pytest.approx(35.06e9, rel=2e-4)
    with_attention = flops_per_token(GPT_J_6B, 2048)
    assert with_attention - without_attention == pytest.approx(1.41e9, rel=2e-3)
    assert with_attention == pytest.approx(36.47e9, rel=2e-4)


def test_published_mfu_of_the_original_run():
    # 151k tokens/s on the 128 chips of a v3-256 at 105 TFLOP/s a chip: 41 %.
    value = mfu(151e3, flops_per_token(GPT_J_6B, 2048), 128 * 105e12)
    assert value == pytest.approx(0.41, abs=0.005)


@pytest.mark.parametrize("peak", [None, 0.0])
def test_an_unknown_peak_gives_none(peak):
    assert mfu(1000.0, 1e9, peak) is None
