"""The logits pipeline, step by step against plain numpy, and the draw against its probabilities."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meshlm.core.errors import UsageError
from meshlm.generation import SamplingConfig
from meshlm.generation import sampling as s
from meshlm.generation.config import split_seed

# Recorded with JAX 0.12.0.1; JAX 0.10.2 gives the same.
GOLDEN_DRAWS = [973, 736, 334, 742]
# XLA takes subnormal numbers for zero.
FLOATS = st.floats(-40, 40, width=32, allow_subnormal=False)


def make_options(rows: int, **given_options: object) -> s.RowOptions:
    values = {
        "seed": 0,
        "seed_high": 0,
        "prompt_index": 0,
        "sample_index": 0,
        "temperature": 1.0,
        "top_k": 1 << 20,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        **given_options,
    }
    integers = {"seed": jnp.uint32, "prompt_index": jnp.int32, "sample_index": jnp.int32}
    integers |= {"seed_high": jnp.uint32, "top_k": jnp.int32}
    return s.RowOptions(
        **{
            name: jnp.broadcast_to(jnp.asarray(value, integers.get(name, jnp.float32)), (rows,))
            for name, value in values.items()
        }
    )


# One compilation each, as decoding has it.
keep_top_k, keep_top_p, keep_min_p = map(jax.jit, (s.keep_top_k, s.keep_top_p, s.keep_min_p))
process_logits = jax.jit(s.process_logits, static_argnums=3)
draw = jax.jit(s.draw)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def kept(logits: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


# Each step.


@given(hnp.arrays(np.float32, 23, elements=FLOATS), st.integers(1, 30))
def test_top_k_keeps_the_largest_and_ties_with_the_last(logits: np.ndarray, k: int) -> None:
    found = keep_top_k(jnp.asarray(logits)[None], jnp.array([k]))[0]
    least = np.sort(logits)[::-1][min(k, logits.size) - 1]
    np.testing.assert_array_equal(np.asarray(found), np.where(logits >= least, logits, -np.inf))


@given(
    hnp.arrays(np.float32, 23, elements=FLOATS, unique=True),
    st.floats(0.01, 0.99),
)
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, p: float) -> None:
    keep = kept(keep_top_p(jnp.asarray(logits)[None], jnp.array([p]))[0])
    probs = softmax(logits)
    assert probs[keep].sum() >= p - 1e-5
    if keep.sum() > 1:
        assert probs[keep].sum() - probs[keep].min() < p + 1e-5
    assert logits[keep].min() > logits[~keep].max(initial=-np.inf)


def test_top_p_keeps_the_token_that_crosses_and_all_at_one() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    assert kept(keep_top_p(logits, jnp.array([0.6]))).tolist() == [[True, True, False, False]]
    assert kept(keep_top_p(logits, jnp.array([1e-9]))).tolist() == [[True, False, False, False]]
    everything = process_logits(logits, jnp.zeros((1, 4), bool), make_options(1), 4)
    assert kept(everything).all()


@given(hnp.arrays(np.float32, 23, elements=FLOATS), st.floats(0.01, 1))
def test_min_p_is_relative_to_the_most_probable(logits: np.ndarray, p: float) -> None:
    keep = kept(keep_min_p(jnp.asarray(logits)[None], jnp.array([p]))[0])
    ratio = softmax(logits) / softmax(logits).max()
    clear = np.abs(ratio - p) > 1e-5
    np.testing.assert_array_equal(keep[clear], (ratio >= p)[clear])
    assert keep[logits.argmax()]


def test_min_p_of_zero_keeps_everything() -> None:
    assert kept(keep_min_p(jnp.array([[0.0, -90.0]]), jnp.zeros(1))).all()


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = jnp.array([[4.0, 4.0, -4.0, -4.0]])
    seen = jnp.array([[True, False, True, False]])
    assert s.penalise(logits, seen, jnp.array([2.0])).tolist() == [[2.0, 4.0, -8.0, -4.0]]


@pytest.mark.parametrize("temperature", [1e-40, 1e-20, 0.5, 1e20])
def test_any_temperature_gives_numbers(temperature: float) -> None:
    logits = jnp.array([[1e4, 3.0, -1e4]])
    found = s.divide_by_temperature(logits, jnp.array([temperature]))
    assert not np.isnan(np.asarray(found)).any()
    assert int(jnp.argmax(found)) == 0


def test_steps_come_in_the_documented_order() -> None:
    # Token 0 is padding to one side: 9 is masked, 1 is penalised below 2, then k = 2 is counted.
    logits = jnp.array([[0.0, 5.0, 4.0, 3.0, 1.0, 9.0]])
    seen = jnp.array([[False, True, False, False, False, False]])
    options = make_options(1, repetition_penalty=5.0, top_k=2, temperature=2.0)
    found = np.asarray(process_logits(logits, seen, options, 5))[0]
    np.testing.assert_allclose(found, [-np.inf, -np.inf, 0.0, -0.5, -np.inf, -np.inf])
    # top_p after top_k: of the two that are left the first has 0.62 of the mass.
    found = process_logits(logits, seen, make_options(1, top_k=2, top_p=0.7), 5)
    assert kept(found)[0].tolist() == [False, True, False, False, False, False]
    # top_p after temperature: at 1 the first token alone reaches 0.6, at 4 it does not.
    flat = make_options(1, temperature=4.0, top_p=0.6)
    assert kept(process_logits(logits, seen, make_options(1, top_p=0.6), 5)).sum() == 1
    assert kept(process_logits(logits, seen, flat, 5)).sum() > 1


def test_rows_have_their_own_options() -> None:
    logits = jnp.broadcast_to(jnp.arange(8.0)[None], (5, 8))
    options = make_options(
        5,
        top_k=[8, 1, 8, 8, 3],
        top_p=[1.0, 1.0, 0.5, 1.0, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.1, 0.0],
        temperature=[1.0, 1.0, 1.0, 1.0, 0.0],
    )
    together = process_logits(logits, jnp.zeros((5, 8), bool), options, 8)
    assert kept(together).sum(axis=1).tolist() == [8, 1, 1, 3, 3]


# The draw.


def test_frequencies_follow_the_probabilities() -> None:
    logits = jnp.array([2.0, 1.0, 0.0, -1.0, 3.0, -jnp.inf, 0.5, 0.0])
    draws = 20_000
    rows = jnp.broadcast_to(logits[None], (draws, 8))
    tokens = draw(rows, make_options(draws, seed=7), jnp.arange(draws, dtype=jnp.int32))
    counts = np.bincount(np.asarray(tokens), minlength=8)
    assert counts[5] == 0
    expected = softmax(np.asarray(logits)) * draws
    possible = expected > 0
    chi_square = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    # 6 degrees of freedom: 22.46 is passed once in a thousand times, and the seed is fixed.
    assert chi_square < 22.46


@pytest.mark.parametrize("name", ["seed", "seed_high", "prompt_index", "sample_index"])
def test_each_part_of_the_key_gives_other_draws(name: str) -> None:
    rows, positions = jnp.zeros((64, 32)), jnp.arange(64, dtype=jnp.int32)
    zero = draw(rows, make_options(64), positions)
    other = draw(rows, make_options(64, **{name: 1}), positions)
    same = np.mean(np.asarray(zero) == np.asarray(other))
    assert same < 0.2
    assert len(set(np.asarray(zero).tolist())) > 15  # positions differ too


def test_a_draw_depends_on_its_own_row_only() -> None:
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    options = make_options(
        6,
        seed=[5, 5, 5, 9, 9, 9],
        prompt_index=[0, 1, 2, 0, 1, 2],
        temperature=[1.0, 0.0, 1.0, 1.0, 1.0, 0.0],
    )
    positions = jnp.array([3, 4, 5, 6, 7, 8], jnp.int32)
    together = draw(logits, options, positions)
    for row in range(6):
        own = jax.tree.map(lambda x, row=row: x[row : row + 1], options)
        alone = draw(logits[row : row + 1], own, positions[row : row + 1])
        assert alone[0] == together[row]
    order = jnp.array([3, 1, 5, 0, 4, 2])
    moved = draw(logits[order], jax.tree.map(lambda x: x[order], options), positions[order])
    np.testing.assert_array_equal(moved, together[order])


def test_draws_stay_what_they_were() -> None:
    """A seed's text is a promise from one version to the next."""
    options = make_options(4, seed=[0, 0, 1, 4294967295], sample_index=[0, 1, 0, 0])
    tokens = draw(jnp.zeros((4, 1000)), options, jnp.array([0, 1, 2, 3], jnp.int32))
    assert tokens.tolist() == GOLDEN_DRAWS


WIDE_SEEDS = [2**32, 2**32 + 1, 1 << 40, -1, -(2**32), -(2**63), 2**63 - 1, 1796046869000]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, *WIDE_SEEDS])
def test_a_seed_of_64_bits_is_jaxs_own_key(seed: int) -> None:
    low, high = split_seed(seed)
    with jax.enable_x64(True):
        key = jax.random.key(jnp.int64(seed), impl="threefry2x32")
    assert jax.random.key_data(key).tolist() == [high, low]
    options = make_options(1, seed=low, seed_high=high)
    for part in (0, 0, 5):  # prompt, sample, position
        key = jax.random.fold_in(key, part)
    noise = jax.random.gumbel(key, (1000,), jnp.float32)
    drawn = draw(jnp.zeros((1, 1000)), options, jnp.array([5], jnp.int32))
    assert int(drawn[0]) == int(jnp.argmax(noise))


def test_seeds_of_64_bits_are_distinct() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, *WIDE_SEEDS]
    assert len({split_seed(seed) for seed in seeds}) == len(seeds)
    assert split_seed(np.uint32(2**32 - 1)) == (2**32 - 1, 0)  # type: ignore[arg-type]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jnp.array([[1.0, 3.0, 3.0]])
    assert draw(logits, make_options(1, temperature=0.0), jnp.zeros(1, jnp.int32)).tolist() == [1]


# Log-probabilities.


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    logits = np.array([[1.0, 2.0, 3.0, 9.0]], np.float32)
    found = s.log_probs(jnp.asarray(logits))
    np.testing.assert_allclose(found, np.log(softmax(logits[0]))[None], rtol=1e-5)
    assert s.pick(found, jnp.array([1]))[0] == found[0, 1]
    best, ids = s.most_probable(found, 3, 2)
    assert ids.tolist() == [[2, 1]]
    assert best.tolist() == [[found[0, 2], found[0, 1]]]


# The configuration.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -(2**63) - 1),
        ("seed", 2**63),
        ("n", 0),
        ("stop", ("a", "")),
        ("logprobs", 21),
    ],
)
def test_wrong_option_is_named_with_value_and_remedy(option: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingConfig(**{option: value})
    message = str(caught.value)
    assert option.replace("_", "-") in message
    assert repr(value) in message
    assert "give" in message
    assert "\n" not in message


def test_a_single_stop_text_is_not_its_letters() -> None:
    assert SamplingConfig(stop="ab").stop == ("ab",)


# The original's order.


def original_order(logits, top_k, top_p, temperature):
    """Both masks on the untempered distribution, then the temperature."""
    order = np.argsort(-logits, kind="stable")
    probs = softmax(logits)
    before = np.cumsum(probs[order]) - probs[order]
    stays = np.zeros(len(logits), bool)
    stays[order[:top_k]] = True
    stays[order[before >= top_p]] = False
    return np.where(stays, (logits - logits.max()) / temperature, -np.inf)


@given(
    hnp.arrays(np.float32, 23, elements=st.floats(-8, 8, width=16), unique=True),
    st.integers(1, 23),
    st.sampled_from([0.1, 0.5, 0.9, 0.99]),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_filters_first_is_the_originals_order(logits, top_k, top_p, temperature):
    options = make_options(1, top_k=top_k, top_p=top_p, temperature=temperature)
    seen = jnp.zeros((1, len(logits)), bool)
    found = process_originals(jnp.asarray(logits)[None], seen, options, len(logits))[0]
    wanted = original_order(logits.astype(np.float64), top_k, top_p, temperature)
    # Where the mass crosses p within rounding either side is right.
    borderline = np.abs(np.cumsum(np.sort(softmax(logits))[::-1]) - top_p).min() < 1e-6
    if not borderline:
        np.testing.assert_array_equal(kept(found), np.isfinite(wanted))
        np.testing.assert_allclose(found[kept(found)], wanted[kept(found)], rtol=1e-5, atol=1e-6)


process_originals = jax.jit(
    lambda logits, seen, options, allowed: s.process_logits(
        logits, seen, options, allowed, filters_first=True
    ),
    static_argnums=3,
)


def test_the_orders_differ():
    """At a high temperature top-p keeps more; the original's looks at the untempered mass."""
    logits = jnp.log(jnp.array([[0.6, 0.2, 0.1, 0.06, 0.04]]))
    options, seen = make_options(1, top_p=0.75, temperature=4.0), jnp.zeros((1, 5), bool)
    assert kept(process_originals(logits, seen, options, 5)).sum() == 2
    assert kept(process_logits(logits, seen, options, 5)).sum() == 4


def test_the_originals_slip_with_token_0_is_not_kept():
    """There a mask of 1e10 times the token's id let token 0 by, whatever its logit."""
    logits = jnp.array([[-5.0, 1.0, 2.0, 3.0, 0.5]])
    options, seen = make_options(1, top_k=2), jnp.zeros((1, 5), bool)
    found = kept(process_originals(logits, seen, options, 5))[0]
    assert np.flatnonzero(found).tolist() == [2, 3]
