"""What is taken from inside of JAX is there, in the JAX that is installed."""

from __future__ import annotations

from meshlm.core import jax_internals


def test_they_are_there():
    state = jax_internals.distributed_state()
    assert state.client is None  # alone
    assert state.coordinator_address is None
    assert jax_internals.runs_on_cloud_tpus() in (True, False)


def test_what_is_given_is_kept():
    assert jax_internals.complete_place("a:1", 4, 3, 5)[:3] == ("a:1", 4, 3)
