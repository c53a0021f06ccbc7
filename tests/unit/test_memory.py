"""The formula of memory: its state against real arrays and hand counts, the rest against steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from meshlm.core.sharding import RULES, make_mesh, use_mesh
from meshlm.model.params import count_params
from meshlm.planning.memory import estimate_memory, least_memory
from meshlm.step import abstract_state
from planned import GPTJ, setup_of
from tiny import DIVISIBLE

WIDE = dataclasses.replace(DIVISIBLE, d_model=256, num_heads=8, head_dim=16, d_ff=512)
MESHES = [{"data": 2, "model": 4}, {"replica": 2, "data": 4}]


def bytes_on_one_device(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(
        x.dtype.itemsize * int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape))))
        for x in leaves
        if x.shape
    )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("sharding", RULES)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_state_is_that_of_the_arrays(mesh, sharding, optimizer):
    setup = setup_of(WIDE, sharding=sharding, optimizer=optimizer, batch_size=8, seq_len=16, **mesh)
    found = estimate_memory(setup)
    devices = make_mesh(setup.mesh)
    with use_mesh(devices, setup.rules):
        state = abstract_state(setup.step, devices)
    assert found.weights_bytes == bytes_on_one_device(state.params)
    # optax keeps an empty number for each array that it does not factor, and the other way.
    spare = 4 * 3 * len(jax.tree.leaves(state.params)) if optimizer == "adafactor" else 0
    real = bytes_on_one_device(state.optimizer)
    assert found.optimizer_bytes <= real <= found.optimizer_bytes + spare


def test_6b_by_hand():
    """GPTJ.md's count of parameters; four bytes each, twice for the moments; one for a gradient."""
    alone = estimate_memory(setup_of(batch_size=1))
    assert count_params(GPTJ) == 6_050_882_784
    assert alone.weights_bytes == 4 * 6_050_882_784
    assert alone.optimizer_bytes == 8 * 6_050_882_784
    assert alone.gradients_bytes == alone.weights_bytes
    assert alone.batch_bytes == 3 * 4 * 2048
    # The stream before each of 28 layers.
    assert alone.kept_bytes == 4 * 28 * 2048 * 4096
    # Three times the logits of a stretch, a head in bfloat16 with a float32 gradient, its input and
    # the gradient of that.
    logits = 3 * 4 * 1024 * 50_400
    assert alone.head_bytes == logits + 6 * 50_400 * 4096 + 2 * 4 * 2048 * 4096


def test_what_more_devices_parts_and_recomputation_do():
    base = setup_of(batch_size=64, data=8, model=2)
    found = estimate_memory(base)
    assert found.total_bytes == (
        found.state_bytes + found.gradients_bytes + found.activations_bytes
    )
    spread = estimate_memory(setup_of(batch_size=64, data=16, model=2))
    assert spread.weights_bytes < 0.51 * found.weights_bytes
    assert spread.kept_bytes == found.kept_bytes // 2
    cut = estimate_memory(setup_of(batch_size=64, data=8, model=2, accumulate=4))
    assert cut.kept_bytes == found.kept_bytes // 4
    assert cut.gradients_bytes == 2 * found.gradients_bytes
    kept = [
        estimate_memory(setup_of(batch_size=64, data=8, model=2, remat=remat)).kept_bytes
        for remat in ("full", "minimal", "none")
    ]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("remat", ["full", "minimal", "none"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_least_is_less(remat, accumulate):
    for mesh in ({}, {"data": 32, "model": 8}, {"data": 256}):
        setup = setup_of(remat=remat, accumulate=accumulate, batch_size=1024, **mesh)
        assert 0 < sum(least_memory(setup)) < estimate_memory(setup).total_bytes


def test_attention_that_keeps_no_scores_needs_less():
    sizes = [
        estimate_memory(setup_of(attention=attention, batch_size=64, data=32, seq_len=2048))
        for attention in ("plain", "chunked", "splash")
    ]
    scores = 4 * 16 * 2 * 2048**2
    assert sizes[0].layer_bytes - sizes[2].layer_bytes == 3 * scores
    assert sizes[1].layer_bytes - sizes[2].layer_bytes == 3 * scores / 8
