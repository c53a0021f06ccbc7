"""A run without memory: one line with the plan's numbers, whatever ran out of it."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from meshlm.core.errors import MeshLMError
from meshlm.core.sharding import MeshConfig
from meshlm.model.params import count_params
from meshlm.planning.setup import Setup
from meshlm.training.out_of_memory import told_out_of_memory
from tiny import DIVISIBLE, OPTIMIZER, step_config

SETUP = Setup(step=step_config(DIVISIBLE), mesh=MeshConfig(), batch_size=8, seq_len=16)


def take_too_much() -> None:
    """What no machine has: 32 TiB, asked of JAX itself."""
    jax.jit(lambda: jnp.zeros(1 << 45, jnp.int8) + 1)().block_until_ready()


def said(setup: Setup = SETUP) -> str:
    with pytest.raises(MeshLMError) as caught, told_out_of_memory(setup):
        take_too_much()
    assert caught.value.exit_code == 1
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jaxs_own_error_becomes_a_line_with_the_plans_numbers():
    message = said()
    assert message.startswith("out of memory on cpu (Out of memory allocating 35184372088832 bytes")
    number = r"([0-9.e-]+)"
    needs = re.search(
        rf"needs {number} GB of a device \(weights {number}, optimizer {number}, "
        rf"gradients {number}, activations {number}\)",
        message,
    )
    assert needs is not None
    total, weights, optimizer, gradients, activations = map(float, needs.groups())
    assert weights == pytest.approx(4 * count_params(DIVISIBLE) / 1e9, rel=0.01)
    assert optimizer == pytest.approx(2 * weights, rel=0.01)
    # The batch is the rest: tokens, targets and mask.
    parts = weights + optimizer + gradients + activations
    assert total == pytest.approx(parts + 3 * 4 * 8 * 16 / 1e9, rel=0.01)
    assert "go on with --remat full or more devices" in message
    assert "or --optimizer adafactor" in message


def test_what_is_done_already_is_not_advised():
    compute = dataclasses.replace(SETUP.step.compute, remat="full")
    optimizer = dataclasses.replace(OPTIMIZER, name="adafactor")
    step = dataclasses.replace(SETUP.step, compute=compute, optimizer=optimizer)
    message = said(dataclasses.replace(SETUP, step=step))
    assert "--remat" not in message
    assert "--optimizer" not in message
    assert "go on with more devices by --mesh.*, or begin a run with more --accumulate" in message


def test_the_hosts_memory_and_other_errors():
    in_words = pytest.raises(MeshLMError, match=r"out of memory on cpu \(no memory on the host\)")
    with in_words, told_out_of_memory(SETUP):
        raise MemoryError
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    as_it_was = pytest.raises(jax.errors.JaxRuntimeError, match="something else")
    with as_it_was, told_out_of_memory(SETUP):
        raise other
