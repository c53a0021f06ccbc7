"""Weights in int8: products against float64 and exact integers, and a whole model in int8."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshlm
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig
from meshlm.core.tree import count_bytes, to_named
from meshlm.generation import DecodeModel, Scorer
from meshlm.model.params import unstack_blocks
from meshlm.model.quantize import quantise_params
from meshlm.ops.attention import attend
from meshlm.ops.cpu import streamed
from meshlm.ops.cpu.library import kernels
from meshlm.ops.weights import Dense, Int8, Matrix, round_rows
from servers import write_checkpoint
from tiny import CONFIG, F32, draw_params, relative_l2, relative_max

needs_kernels = pytest.mark.skipif(
    not kernels().ready, reason=f"no compiled kernels: {kernels().detail}"
)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact_dot(x: np.ndarray, weight: Int8) -> np.ndarray:
    """The product as it is defined, with whole numbers in int64."""
    values = np.asarray(weight.values, np.int64).reshape(weight.scale.size, -1)
    largest = np.abs(x).max(axis=-1).astype(np.float32)
    factor = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    rows = np.rint(x * factor[:, None]).astype(np.int64)
    scale = (largest * (np.float32(1) / np.float32(127)))[:, None] * np.asarray(
        weight.scale
    ).reshape(1, -1)
    return (rows @ values.T).astype(np.float32) * scale


def kernel_dots(pairs: list[tuple[jax.Array, Matrix]]) -> list[jax.Array]:
    """The products of [M, K] with [N, K], by the compiled kernel whatever the platform."""
    return streamed.products([weight.streamed_operands(x, 1) for x, weight in pairs])


# Rounding.


@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-20, 1e20), st.integers(0, 99))
@settings(max_examples=15)
def test_rounding_is_within_half_a_unit_and_reaches_127(rows, inner, size, seed):
    x = draw(rows, inner, seed=seed) * np.float32(size)
    values, scale = map(np.asarray, round_rows(jnp.asarray(x)))
    assert values.dtype == np.int8
    np.testing.assert_array_equal(np.abs(values.astype(int)).max(axis=1), 127)
    error = np.abs(values * scale[:, None].astype(np.float64) - x)
    assert (error <= 0.5001 * scale[:, None]).all()


def test_a_row_of_zeros_stays_zero_and_what_is_not_finite_is_seen():
    x = jnp.asarray([[0.0, 0.0], [1.0, jnp.inf], [jnp.nan, 1.0], [1e-45, 0.0]])
    values, scale = map(np.asarray, round_rows(x))
    assert not values[0].any()
    assert np.isfinite(scale).tolist() == [True, False, False, True]
    y = np.asarray(Int8.from_array(jnp.ones((3, 2))).plain_dot(x))
    assert not y[0].any()
    assert not np.isfinite(y[1:3]).any()


def test_each_output_has_its_own_scale():
    weight = jnp.asarray(draw(6, 8) * np.logspace(-6, 6, 6, dtype=np.float32)[:, None])
    error = np.abs(np.asarray(Int8.from_array(weight).to_array()) - weight)
    assert (error.max(axis=1) <= 0.5001 * np.abs(weight).max(axis=1) / 127).all()


# Products.

SHAPES = [((1, 1, 8), (3, 8), 1), ((2, 5, 8), (3, 4, 8), 1), ((3, 1, 4, 20), (70, 4, 20), 2)]


@pytest.mark.parametrize(("x_shape", "w_shape", "contract"), SHAPES)
def test_a_product_is_near_that_in_float64_and_exactly_its_definition(x_shape, w_shape, contract):
    x, weight = draw(*x_shape), draw(*w_shape, seed=1)
    in_int8 = Int8.from_array(jnp.asarray(weight), contract)
    found = np.asarray(in_int8.dot(jnp.asarray(x), contract=contract))
    outs = w_shape[: len(w_shape) - contract]
    assert found.shape == (*x_shape[: len(x_shape) - contract], *outs)
    inner = int(np.prod(w_shape[len(outs) :]))
    flat_x = x.reshape(-1, inner)
    np.testing.assert_array_equal(found.reshape(len(flat_x), -1), exact_dot(flat_x, in_int8))
    # Half a unit in each operand: |error| <= (|x| s_w + |w| s_x + s_x s_w / 2) / 2, summed.
    flat_w = weight.reshape(-1, inner).astype(np.float64)
    unit_x = np.abs(flat_x).max(axis=1) / 127
    unit_w = np.abs(flat_w).max(axis=1) / 127
    bound = 0.5 * (
        np.abs(flat_x).sum(axis=1)[:, None] * unit_w
        + unit_x[:, None] * np.abs(flat_w).sum(axis=1)
        + inner * unit_x[:, None] * unit_w / 2
    )
    error = np.abs(found.reshape(len(flat_x), -1) - flat_x.astype(np.float64) @ flat_w.T)
    assert (error <= 1.001 * bound).all()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
def test_kernels_products_in_int8_are_the_references_bit_for_bit(rows):
    pairs = [
        (
            jnp.asarray(draw(rows, inner, seed=inner)),
            Int8.from_array(jnp.asarray(draw(outs, inner))),
        )
        for outs, inner in ((1, 1), (7, 5), (33, 70), (130, 1024), (6, 200))
    ]
    pairs.append((pairs[-1][0], Int8.from_array(jnp.asarray(draw(9, 200, seed=1)))))
    found, wanted = jax.jit(
        lambda: (kernel_dots(pairs), [weight.plain_dot(x) for x, weight in pairs])
    )()
    for y, reference in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(y, reference)


@needs_kernels
def test_kernels_products_of_rows_of_zeros_and_not_finite_ones():
    x = jnp.asarray([[0.0, 0.0], [1.0, jnp.inf], [jnp.nan, 1.0], [3.0, -1.0]])
    weight = Int8.from_array(jnp.ones((3, 2)))
    (found,) = jax.jit(lambda x: kernel_dots([(x, weight)]))(x)
    assert not np.asarray(found)[0].any()
    assert not np.isfinite(np.asarray(found)[1:3]).any()
    np.testing.assert_array_equal(found[3], weight.plain_dot(x)[3])


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_kernels_products_are_those_of_float64_to_float32s_precision(rows, dtype):
    pairs = [
        (
            jnp.asarray(draw(rows, inner, seed=inner), dtype),
            Dense(jnp.asarray(draw(outs, inner), dtype)),
        )
        for outs, inner in ((1, 1), (7, 5), (33, 70), (130, 1024))
    ]
    for y, (x, weight) in zip(jax.jit(lambda: kernel_dots(pairs))(), pairs, strict=True):
        wanted = np.asarray(x, np.float64) @ np.asarray(weight.array, np.float64).T
        assert y.dtype == jnp.float32
        assert np.abs(y - wanted).max() <= 2e-6 * np.abs(wanted).max() + 1e-6


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_rows_product_does_not_depend_on_the_rows_beside_it(dtype):
    x, weight = jnp.asarray(draw(9, 100)), jnp.asarray(draw(50, 100, seed=1))
    weight = Int8.from_array(weight) if dtype == "int8" else Dense(weight.astype(dtype))
    x = x if dtype == "int8" else x.astype(dtype)
    run = jax.jit(lambda x: kernel_dots([(x, weight)])[0])
    together = np.asarray(run(x))
    for rows in (1, 3, 8):
        np.testing.assert_array_equal(run(x[:rows]), together[:rows])


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_kernels_attention_to_a_cache_is_the_plain_one(head_dim, dtype):
    rows, heads, places = 3, 2, 40
    lengths = jnp.asarray([1, 17, 40], jnp.int32)
    q = 3 * jnp.asarray(draw(rows, 1, heads, head_dim), dtype)
    keys, values = (
        jnp.asarray(draw(rows, heads, places, head_dim, seed=seed), dtype) for seed in (1, 2)
    )
    # What is not in use may be anything.
    unused = jnp.arange(places)[None, None, :, None] >= lengths[:, None, None, None]
    mask = ~unused.transpose(0, 1, 3, 2)
    wanted = attend(q, keys, values, mask)[:, 0]
    found = jax.jit(streamed.attend)(
        q[:, 0], jnp.where(unused, jnp.nan, keys), jnp.where(unused, jnp.nan, values), lengths
    )
    assert relative_max(found, wanted) < 1e-6


# A model.


def test_only_matrices_of_products_are_in_int8():
    params = draw_params(CONFIG)
    found = to_named(quantise_params(CONFIG, unstack_blocks(params)))
    matrices = ("attention", "feed_forward", "head")
    for name, array in found.items():
        is_matrix = any(part in matrices for part in name.split("."))
        assert (array.dtype == jnp.int8) == (is_matrix and name.endswith("values")), name
    attention_out = found["blocks.0.attention.out.weight.scale"]
    assert attention_out.shape == (CONFIG.d_model,)
    assert found["blocks.0.attention.query.weight.scale"].shape == (
        CONFIG.num_heads,
        CONFIG.head_dim,
    )


def models() -> tuple[DecodeModel, DecodeModel]:
    """The same weights in float32 and in int8."""
    params = unstack_blocks(draw_params(CONFIG))
    own, in_int8 = (
        DecodeModel.prepare(weights, CONFIG, F32, allowed_vocab=CONFIG.vocab_size)
        for weights in (params, quantise_params(CONFIG, params))
    )
    return own, in_int8


def test_logits_in_int8_are_near_those_of_float32():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 20))
    own, in_int8 = (Scorer(model, start_id=0).logits(tokens) for model in models())
    # Random weights average nothing out; a trained model's logits are nearer (docs).
    assert 1e-4 < relative_l2(in_int8, own) < 0.05


def test_logits_are_those_of_the_weights_that_int8_stands_for():
    # With the weights' rounding in both, what is left is that of the activations.
    params = quantise_params(CONFIG, unstack_blocks(draw_params(CONFIG)))
    rounded = jax.tree.map(
        lambda w: w.to_array() if isinstance(w, Matrix) else w,
        params,
        is_leaf=lambda w: isinstance(w, Matrix),
    )
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 20))
    found, wanted = (
        Scorer(
            DecodeModel.prepare(weights, CONFIG, F32, allowed_vocab=CONFIG.vocab_size),
            start_id=0,
        ).logits(tokens)
        for weights in (params, rounded)
    )
    assert relative_l2(found, wanted) < 0.03


# Loading.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return write_checkpoint(tmp_path_factory.mktemp("quantize"))


def test_a_model_loaded_in_int8_generates_and_scores(checkpoint):
    own, in_int8 = meshlm.load(checkpoint), meshlm.load(checkpoint, quantize="int8")
    assert isinstance(in_int8.params.blocks[1].feed_forward.down.weight, Int8)
    matrices = count_bytes(own.params.blocks)
    assert count_bytes(in_int8.params.blocks) < 0.35 * matrices
    tokens = [[1, 2, 3, 4, 5]]
    assert relative_l2(in_int8.logits(tokens), own.logits(tokens)) < 0.05
    sample = in_int8.generate([1, 2, 3], max_tokens=9, ignore_end_of_text=True)
    assert len(sample.tokens) == 9
    likelihood, _ = in_int8.loglikelihood([1, 2], [3, 4])
    assert likelihood == pytest.approx(own.loglikelihood([1, 2], [3, 4])[0], rel=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "int4"}, "--quantize int4: choose int8"),
        ({"profile": "hf"}, "--profile hf"),
        ({"mesh": MeshConfig(model=2)}, "is for one device"),
    ],
)
def test_what_int8_cannot_do_is_refused(checkpoint, options, said):
    with pytest.raises(UsageError, match=said):
        meshlm.load(checkpoint, **{"quantize": "int8", **options})


def test_cached_decoding_in_int8_is_the_pass_over_the_whole(checkpoint):
    model = meshlm.load(checkpoint, quantize="int8", dtype="float32")
    sample = model.generate([5, 6, 7], max_tokens=20, temperature=0.0, ignore_end_of_text=True)
    whole = [5, 6, 7, *sample.tokens]
    logits = np.asarray(model.logits([whole]), np.float64)[0, 2:-1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = log_probs[np.arange(20), sample.tokens]
    # A number that the two passes round to neighbours moves a row by a unit.
    np.testing.assert_allclose(sample.logprobs, own, atol=0.02)
