"""Recorded outputs of the original mesh-transformer-jax, from a small checkpoint that it wrote.

Needs no torch: the recordings are in tests/fixtures/mtj. The checkpoint has the layout of the
released one: folders of 16 npz files a shard, leaves without names.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.model.cache import init_cache
from meshlm.model.config import ModelConfig
from meshlm.model.params import Block, Params, count_params, unstack_blocks
from meshlm.model.transformer import forward, forward_cached, unembed
from meshlm.ops.loss import token_loss
from meshlm.step import StepBatch, batch_loss
from tiny import F32, relative_max, step_config

pytestmark = pytest.mark.parity

FOLDER = Path(__file__).parent.parent / "fixtures" / "mtj" / "dev_s4_distinct"
SHARDS = 4


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    theirs = json.loads((FOLDER / "config.json").read_text())
    return ModelConfig(
        num_layers=theirs["layers"],
        d_model=theirs["d_model"],
        num_heads=theirs["n_heads"],
        head_dim=theirs["d_model"] // theirs["n_heads"],
        d_ff=4 * theirs["d_model"],
        vocab_size=theirs["n_vocab"],
        context_length=theirs["seq"],
        rotary_dim=theirs["pe_rotary_dims"],
    )


def leaves_of(shard: int) -> list[np.ndarray]:
    leaves = []
    for part in range(16):
        with np.load(FOLDER / "slim" / "step_383500" / f"shard_{shard}" / f"{part}.npz") as file:
            leaves += [file[f"arr_{i}"] for i in range(len(file))]
    return leaves


@pytest.fixture(scope="module")
def params(config) -> Params:
    """By order alone: embedding (b, w), then the layers, then the head with its norm, then step."""
    shards = list(zip(*map(leaves_of, range(SHARDS)), strict=True))
    assert len(shards) == 2 + 10 * config.num_layers + 4 + 1
    L, D, N, H = config.num_layers, config.d_model, config.num_heads, config.head_dim

    def joined(leaf, axis):
        return np.concatenate(shards[leaf], axis)

    def summed(leaf):
        return np.sum(shards[leaf], axis=0, dtype=np.float64)

    def first(leaf):  # the norms of the other shards were never trained
        return shards[leaf][0]

    def stacked(leaf_of_layer):
        values = [leaf_of_layer(2 + 10 * layer) for layer in range(L)]
        return jnp.asarray(np.stack(values), jnp.float32)

    # q, v, k, out, fc_in (b, w), fc_out (b, w), norm (offset, scale); weights are [in, out].
    blocks = Block(
        query=stacked(lambda at: joined(at, 1).T.reshape(N, H, D)),
        value=stacked(lambda at: joined(at + 1, 1).T.reshape(N, H, D)),
        key=stacked(lambda at: joined(at + 2, 1).T.reshape(N, H, D)),
        attention_out=stacked(lambda at: joined(at + 3, 0).T.reshape(D, N, H)),
        ff_in_bias=stacked(lambda at: joined(at + 4, 0)),
        ff_in=stacked(lambda at: joined(at + 5, 1).T),
        ff_out_bias=stacked(lambda at: summed(at + 6)),
        ff_out=stacked(lambda at: joined(at + 7, 0).T),
        norm_offset=stacked(lambda at: first(at + 8)),
        norm_scale=stacked(lambda at: first(at + 9)),
    )
    end = 2 + 10 * L
    return Params(
        # Its bias has no place of its own here: it joins every row.
        embedding=jnp.asarray(joined(1, 0) + summed(0), jnp.float32),
        blocks=blocks,
        head_bias=jnp.asarray(joined(end, 0)),
        head=jnp.asarray(joined(end + 1, 1).T),
        final_norm_offset=jnp.asarray(first(end + 2)),
        final_norm_scale=jnp.asarray(first(end + 3)),
    )


def test_the_checkpoint_has_all_parameters(config, params):
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count_params(config)


def test_logits(config, params, golden):
    tokens = jnp.asarray(golden["tokens"][None], jnp.int32)
    found = jax.jit(lambda p, t: forward(p, config, t, F32))(params, tokens)
    assert relative_max(found[0], golden["logits"]) <= 2e-5


def test_the_loss_of_every_token(golden):
    targets = jnp.asarray(golden["targets"][None], jnp.int32)
    found = token_loss(jnp.asarray(golden["logits"][None]), targets)
    np.testing.assert_allclose(found.nll_BT[0], golden["all_loss"], rtol=1e-5)


@pytest.mark.parametrize(("z_loss", "recorded"), [(0.0, "loss"), (1e-4, "loss_z")])
def test_the_loss(config, params, golden, z_loss, recorded):
    tokens, targets = (jnp.asarray(golden[n][None], jnp.int32) for n in ("tokens", "targets"))
    batch = StepBatch(
        tokens=tokens, targets=targets, loss_mask=jnp.ones(tokens.shape), segment_ids=None
    )
    step = step_config(config, z_loss=z_loss)
    total, count = jax.jit(lambda p, b: batch_loss(p, b, step))(params, batch)
    assert float(total / count) == pytest.approx(float(golden[recorded]), rel=2e-6)


def test_the_z_loss_tells(golden):
    # The two recordings differ by enough for the test above to tell them apart.
    assert abs(golden["loss_z"] / golden["loss"] - 1) > 5e-6


def test_greedy_decoding_with_a_cache(config, params, golden):
    """The original decodes right-aligned in its window; rotary attention sees distances alone."""
    apart = unstack_blocks(params)
    cache = init_cache(config, 1, config.context_length, "float32")

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = forward_cached(apart, config, tokens, positions, cache, F32)
        return unembed(apart, hidden, F32), cache

    prompt = jnp.asarray(golden["prompt"][None], jnp.int32)
    logits, cache = step(prompt, jnp.arange(5, dtype=jnp.int32)[None], cache)
    for number, (token, recorded) in enumerate(
        zip(golden["greedy"], golden["greedy_logits"], strict=True)
    ):
        assert relative_max(logits[0, -1], recorded) <= 2e-5
        assert int(jnp.argmax(logits[0, -1])) == token
        position = jnp.full((1, 1), 5 + number, jnp.int32)
        logits, cache = step(jnp.full((1, 1), token, jnp.int32), position, cache)
