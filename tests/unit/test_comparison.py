"""The figures of a comparison, against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meshlm.comparison import measure
from meshlm.conversion.proof.certificate import spread_tokens


def test_figures_by_hand():
    # Two positions, two tokens: probabilities (1/2, 1/2) and (3/4, 1/4), then one distribution.
    one = np.log(np.array([[0.5, 0.5], [0.2, 0.8]], np.float32))
    other = np.log(np.array([[0.75, 0.25], [0.2, 0.8]], np.float32))
    found = measure(one, other)
    assert found.tokens == 2
    assert found.max_difference == pytest.approx(math.log(2), rel=1e-6)
    assert found.mean_difference == pytest.approx((math.log(1.5) + math.log(2)) / 4, rel=1e-6)
    assert found.largest_logit == pytest.approx(-math.log(0.2), rel=1e-6)
    assert found.relative_difference == pytest.approx(math.log(2) / -math.log(0.2), rel=1e-6)
    # KL((1/2, 1/2) || (3/4, 1/4)) = (ln(2/3) + ln 2) / 2, at one of the two positions.
    assert found.kl == pytest.approx((math.log(2 / 3) + math.log(2)) / 4, rel=1e-6)
    assert found.top1_agreement == 1.0


def test_a_shift_of_all_logits_is_no_other_distribution():
    logits = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    found = measure(logits, logits + 3)
    assert found.max_difference == pytest.approx(3, rel=1e-5)
    assert abs(found.kl) < 1e-9
    assert found.top1_agreement == 1


def test_disagreement_is_counted():
    one = np.eye(4, dtype=np.float32)
    assert measure(one, one[[0, 1, 3, 2]]).top1_agreement == 0.5


def test_spread_tokens_are_of_the_vocabulary_and_spread():
    tokens = spread_tokens(50_400, 512)
    assert len(tokens) == 512
    assert 0 <= min(tokens) < 1000
    assert 49_000 < max(tokens) < 50_400
