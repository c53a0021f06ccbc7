"""GPT-J-6B type-checks on an 8 x 8 mesh that does not exist; a wrong sharding does not."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from meshlm.core import sharding
from meshlm.core.sharding import AXES, sharding_of
from meshlm.core.tree import from_named, to_named
from meshlm.model.params import abstract_params
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import Compute, forward
from meshlm.step import StepBatch, init_state, loss_and_grads, train_step
from tiny import step_config

P = PartitionSpec
GPTJ = PRESETS["gpt-j-6b"]
WAYS = [
    Compute(),
    Compute(remat="full"),
    Compute(dtype="float32", remat="minimal", scan_layers=False),
]


def abstract_mesh(replica: int, data: int, model: int) -> AbstractMesh:
    return AbstractMesh((replica, data, model), AXES, axis_types=(AxisType.Explicit,) * 3)


POD = abstract_mesh(1, 8, 8)
EVERY = abstract_mesh(2, 4, 8)


def split(x: jax.ShapeDtypeStruct) -> P:
    """How the array lies; an abstract scalar has no sharding."""
    return P() if x.sharding is None else x.sharding.spec


def abstract_batch(mesh, rows: int, length: int, *, segments: bool = False) -> StepBatch:
    def rows_of(dtype):
        return jax.ShapeDtypeStruct(
            (rows, length), dtype, sharding=sharding_of(mesh, "batch", None)
        )

    return StepBatch(
        tokens=rows_of(jnp.int32),
        targets=rows_of(jnp.int32),
        loss_mask=rows_of(jnp.float32),
        segment_ids=rows_of(jnp.int32) if segments else None,
    )


@pytest.mark.parametrize("compute", WAYS, ids=str)
def test_the_loss_and_gradients_of_6b_on_an_8_by_8_mesh(compute):
    config = step_config(GPTJ, compute=compute)
    params = abstract_params(GPTJ, POD)
    start = time.process_time()
    with jax.sharding.use_abstract_mesh(POD):
        loss, grads, _ = jax.eval_shape(
            lambda p, b: loss_and_grads(p, b, config), params, abstract_batch(POD, 64, 2048)
        )
    assert time.process_time() - start < 20
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    for grad, weight in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert (grad.shape, grad.dtype) == (weight.shape, weight.dtype)
        # Reduce-scattered into the weight's own shards, not left whole on every device.
        assert grad.sharding.spec == weight.sharding.spec


@pytest.mark.parametrize("sizes", [(1, 8, 8), (4, 16, 4), (2, 1, 16), (16, 8, 1)], ids=str)
def test_the_train_step_of_6b(sizes):
    mesh = abstract_mesh(*sizes)
    config = step_config(GPTJ, compute=Compute(remat="full"), accumulate=2, z_loss=1e-4)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config, 0))
        batch = abstract_batch(mesh, 256, 2048, segments=True)
        after, metrics = jax.eval_shape(lambda s, b: train_step(s, b, config), state, batch)
    assert metrics.loss.shape == ()
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype, split(new)) == (old.shape, old.dtype, split(old))


def test_the_logits_of_6b_are_split_by_vocabulary():
    logits = logits_of_6b(POD)
    assert logits.shape == (16, 2048, 50_400)
    assert logits.sharding.spec == P("data", None, "model")


def logits_of_6b(mesh):
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(
            lambda p, t: forward(p, GPTJ, t, Compute()),
            abstract_params(GPTJ, mesh),
            abstract_batch(mesh, 16, 2048).tokens,
        )


@pytest.mark.parametrize(
    ("dim", "axes"),
    [
        ("heads", ("replica",)),  # the batch has that axis
        ("ff", ("replica",)),
        ("vocab", ("replica",)),
        ("batch", ("data", "model")),  # the heads have that axis
        ("ff", ("data",)),  # the other dim of the same weight has it
        ("heads", ("modle",)),
    ],
)
def test_a_wrong_rule_is_an_error_when_traced(monkeypatch, dim, axes):
    wrong = dataclasses.replace(sharding.DEFAULT_RULES, **{dim: axes})
    monkeypatch.setattr(sharding, "current_rules", lambda: wrong)
    with pytest.raises(Exception, match=axes[-1]):
        logits_of_6b(EVERY)


@pytest.mark.parametrize("linear", ["up", "down"])
def test_a_misplaced_weight_is_an_error_when_traced(linear):
    params = abstract_params(GPTJ, POD)
    name = f"blocks.feed_forward.{linear}.bias"
    named = to_named(params)
    wrong = NamedSharding(POD, P(None, "data"))
    named[name] = jax.ShapeDtypeStruct(named[name].shape, named[name].dtype, sharding=wrong)
    with jax.sharding.use_abstract_mesh(POD), pytest.raises(Exception, match=r"illegally|incompat"):
        jax.eval_shape(
            lambda p, t: forward(p, GPTJ, t, Compute()),
            from_named(params, named),
            abstract_batch(POD, 16, 2048).tokens,
        )
