"""Small models, batches, and the norms in which closeness is stated: for all numerical tests."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from meshlm.core.sharding import MeshConfig, make_mesh, sharding_of
from meshlm.core.tree import map_named, to_named
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.params import Params, weight_tree
from meshlm.model.transformer import Compute
from meshlm.optim import OptimizerConfig
from meshlm.step import StepBatch, StepConfig

F32 = Compute(dtype="float32")
# No dim equals another, and d_ff is not 4 d_model: a swapped dim cannot go unseen.
CONFIG = gpt_j(
    num_layers=2,
    d_model=24,
    num_heads=4,
    head_dim=6,
    d_ff=40,
    vocab_size=48,
    context_length=32,
    rotary_dim=4,
)
# Every split dim can be shared by eight devices.
DIVISIBLE = dataclasses.replace(CONFIG, d_model=32, num_heads=8, head_dim=4, vocab_size=64)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=2, anneal_steps=10
)


def draw_params(config: ModelConfig, seed: int = 0, scale: float = 0.3) -> Params:
    """Float32 parameters with every bias and norm away from its initial value, stacked."""
    rng = np.random.default_rng(seed)

    def draw(_, weight):
        return jnp.asarray(weight.fill + scale * rng.standard_normal(weight.shape), jnp.float32)

    return map_named(draw, weight_tree(config))


def draw_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    return jnp.asarray(tokens, jnp.int32)


def draw_batch(
    config: ModelConfig, batch: int, length: int, seed: int = 0, *, segments: bool = False
) -> StepBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (batch, length + 1))
    starts = rng.random((batch, length)) < 3 / length
    return StepBatch(
        tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
        targets=jnp.asarray(tokens[:, 1:], jnp.int32),
        loss_mask=jnp.ones((batch, length), jnp.float32),
        segment_ids=jnp.asarray(np.cumsum(starts, axis=1), jnp.int32) if segments else None,
    )


def step_config(model: ModelConfig = CONFIG, **changes) -> StepConfig:
    return dataclasses.replace(StepConfig(model=model, optimizer=OPTIMIZER, compute=F32), **changes)


@functools.cache
def mesh_of(replica: int = 1, data: int = 1, model: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(replica=replica, data=data, model=model))


def on_mesh(mesh: jax.sharding.Mesh, config: ModelConfig, params: Params) -> Params:
    """The same parameters in the shards that the rules give them."""
    return jax.tree.map(
        lambda x, weight: jax.device_put(x, sharding_of(mesh, *weight.dims)),
        params,
        weight_tree(config),
    )


def batch_on_mesh(mesh: jax.sharding.Mesh, batch: StepBatch) -> StepBatch:
    return jax.device_put(batch, sharding_of(mesh, "batch", None))


def relative_max(found, wanted) -> float:
    """The largest difference, relative to the largest |wanted|."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def relative_l2(found, wanted) -> float:
    """The L2 norm of the difference, relative to that of `wanted`."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def assert_trees_close(found, wanted, tolerance: float) -> None:
    """Every tensor within `tolerance` in relative L2; names the worst."""
    found, wanted = to_named(found), to_named(wanted)
    assert found.keys() == wanted.keys()
    errors = {name: relative_l2(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e}"


def assert_trees_identical(found, wanted) -> None:
    """Every tensor the same, bit for bit."""
    found, wanted = to_named(found), to_named(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name
