"""Decoding with a cache gives the logits of the whole sequence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptj_float64
from meshlm.core.sharding import sharding_of
from meshlm.model.cache import cache_mask, extend, init_cache
from meshlm.model.params import unstack_blocks
from meshlm.model.transformer import Compute, forward, forward_cached, unembed
from tiny import CONFIG, F32, draw_params, draw_tokens, mesh_of, on_mesh, relative_max

PARAMS = draw_params(CONFIG)
APART = unstack_blocks(PARAMS)
PLACES, LENGTH, BATCH = 16, 11, 3
TOKENS = draw_tokens(CONFIG, BATCH, LENGTH)
WHOLE = gptj_float64.forward(PARAMS, CONFIG, TOKENS)


@functools.partial(jax.jit, static_argnames="compute")
def step(tokens, positions, cache, compute=F32, params=APART):
    hidden, cache = forward_cached(params, CONFIG, tokens, positions, cache, compute)
    return unembed(params, hidden, compute), cache


def positions_from(starts, length):
    return jnp.asarray(np.asarray(starts)[:, None] + np.arange(length), jnp.int32)


def run(pieces, cache, compute=F32, params=APART):
    """Logits of TOKENS, fed in pieces of these lengths."""
    logits, start = [], 0
    for length in pieces:
        positions = positions_from([start] * BATCH, length)
        piece, cache = step(TOKENS[:, start : start + length], positions, cache, compute, params)
        logits.append(piece)
        start += length
    return jnp.concatenate(logits, axis=1), cache


def empty(dtype="float32"):
    return init_cache(CONFIG, BATCH, PLACES, dtype)


@pytest.mark.parametrize("pieces", [(11,), (5, 1, 1, 1, 1, 1, 1), (1,) * 11, (4, 5, 2)], ids=str)
def test_any_pieces_give_the_logits_of_the_whole(pieces):
    found, _ = run(pieces, empty())
    assert relative_max(found, WHOLE) < 1e-5


def test_rows_may_be_at_different_places():
    """Right-padded prompts of 3, 7 and 5 tokens, then one token a row at a time."""
    lengths = np.array([3, 7, 5])
    logits, cache = step(TOKENS[:, :7], positions_from([0, 0, 0], 7), empty())
    last = np.asarray(logits)[np.arange(BATCH), lengths - 1]
    assert relative_max(last, WHOLE[np.arange(BATCH), lengths - 1]) < 1e-5
    for done in range(4):
        at = lengths + done
        tokens = np.asarray(TOKENS)[np.arange(BATCH), at][:, None]
        logits, cache = step(jnp.asarray(tokens), positions_from(at, 1), cache)
        assert relative_max(logits[:, 0], WHOLE[np.arange(BATCH), at]) < 1e-5


def test_what_lies_in_later_places_is_not_seen():
    _, cache = run((6,), empty())
    dirty = jax.tree.map(lambda x: x.at[:, :, 6:].set(1e6), cache)
    clean_logits, _ = step(TOKENS[:, 6:8], positions_from([6] * BATCH, 2), cache)
    dirty_logits, _ = step(TOKENS[:, 6:8], positions_from([6] * BATCH, 2), dirty)
    assert (np.asarray(clean_logits) == np.asarray(dirty_logits)).all()


def test_one_row_does_not_touch_another():
    _, cache = run((6,), empty())
    other = TOKENS.at[1].set((TOKENS[1] + 1) % CONFIG.vocab_size)
    positions = positions_from([6] * BATCH, 2)
    (here, _), (there, _) = (step(t[:, 6:8], positions, cache) for t in (TOKENS, other))
    same = (np.asarray(here) == np.asarray(there)).all(axis=(1, 2))
    np.testing.assert_array_equal(same, [True, False, True])


def test_extending_writes_the_new_places_and_no_other():
    layer = empty().layers[0]
    full = jax.tree.map(lambda x: jnp.full_like(x, 7.0), layer)
    k = np.random.default_rng(0).standard_normal((BATCH, 4, 2, 6)).astype(np.float32)
    written = extend(full, jnp.asarray([0, 5, 14]), jnp.asarray(k), jnp.asarray(-k))
    wanted = np.full(layer.keys.shape, 7.0, np.float32)
    for row, start in enumerate([0, 5, 14]):
        wanted[row, :, start : start + 2] = k[row]
    np.testing.assert_array_equal(written.keys, wanted)
    np.testing.assert_array_equal(written.values, np.where(wanted == 7.0, 7.0, -wanted))


@settings(max_examples=20)
@given(st.lists(st.integers(0, PLACES - 1), min_size=1, max_size=4))
def test_the_mask(positions):
    mask = np.asarray(cache_mask(empty(), jnp.asarray([positions], jnp.int32)))
    wanted = [[place <= position for place in range(PLACES)] for position in positions]
    np.testing.assert_array_equal(mask[0, 0], wanted)


def test_the_caches_shape_and_type():
    cache = empty("bfloat16")
    assert len(cache.layers) == CONFIG.num_layers
    assert cache.num_places == PLACES
    assert cache.layers[0].keys.shape == (BATCH, 4, PLACES, 6)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    _, after = run((3,), cache, Compute(dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}


def test_in_bfloat16_it_agrees_with_the_whole_forward_in_bfloat16():
    compute = Compute(dtype="bfloat16", scan_layers=False)
    whole = jax.jit(lambda p, t: forward(p, CONFIG, t, compute))(PARAMS, TOKENS)
    found, _ = run((5, 1, 1, 4), empty("bfloat16"), compute)
    assert relative_max(found, whole) < 1e-2


@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 2, 2), (2, 1, 2)])
def test_on_a_mesh(sizes):
    mesh = mesh_of(*sizes)
    rows = sharding_of(mesh, "batch", None)
    with jax.set_mesh(mesh):
        cache = init_cache(CONFIG, 2, PLACES, "float32")
        params = unstack_blocks(on_mesh(mesh, CONFIG, PARAMS))
        for start, stop in [(0, 5), (5, 6), (6, 11)]:
            tokens, positions = jax.device_put(
                (TOKENS[:2, start:stop], positions_from([start] * 2, stop - start)), rows
            )
            logits, cache = step(tokens, positions, cache, params=params)
            assert relative_max(logits, WHOLE[:2, start:stop]) < 1e-5
    # Split over the batch and the heads, and so it stays.
    shard = cache.layers[0].keys.addressable_shards[0].data
    assert shard.shape == (2 // (sizes[0] * sizes[1]), 4 // sizes[2], PLACES, 6)
