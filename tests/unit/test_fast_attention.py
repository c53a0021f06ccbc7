"""Every form of attention gives what the plain one gives, and the best that compiles is chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.core.errors import UsageError
from meshlm.core.sharding import use_mesh
from meshlm.ops import fast_attention
from meshlm.ops.fast_attention import attend_causally, check_attention, choose_attention
from tiny import mesh_of

B, T, N, H = 2, 256, 2, 128
SEGMENTS = np.cumsum(np.random.default_rng(5).random((B, T)) < 0.03, axis=1).astype(np.int32)


def drawn(heads: int = N, head_dim: int = H):
    rng = np.random.default_rng(0)
    shapes = (B, T, heads, head_dim), (B, heads, T, head_dim), (B, heads, T, head_dim)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def value_and_gradient(name, arrays, segments):
    weight = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)

    def loss(q, k, v):
        mixed = attend_causally(name, q, k, v, segments, interpret=True)
        return jnp.sum(mixed * weight), mixed

    (_, mixed), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [mixed, *grads]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", ["chunked", "splash"])
def test_each_form_and_its_gradient_are_those_of_the_plain_one(name, segments, monkeypatch):
    monkeypatch.setattr(fast_attention, "MIN_CHUNK", 96)  # 96, 96 and 64 queries
    arrays = drawn()
    found = value_and_gradient(name, arrays, segments)
    for one, other in zip(found, value_and_gradient("plain", arrays, segments), strict=True):
        assert jnp.linalg.norm(one - other) <= 2e-6 * jnp.linalg.norm(other)


def test_a_form_works_on_a_mesh(monkeypatch):
    monkeypatch.setattr(fast_attention, "MIN_CHUNK", 96)
    arrays = drawn()
    wanted = attend_causally("plain", *arrays)
    mesh = mesh_of(1, 2, 2)
    with use_mesh(mesh):
        q, k, v = (
            jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip(
                arrays,
                (jax.P("data", None, "model"), jax.P("data", "model"), jax.P("data", "model")),
                strict=True,
            )
        )
        for name in ("chunked", "splash"):
            found = jax.jit(
                lambda q, k, v, name=name: attend_causally(name, q, k, v, interpret=True)
            )(q, k, v)
            assert found.sharding.spec[:1] == ("data",)
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_chunks_skip_the_keys_that_no_query_of_theirs_sees():
    """A little over half of the products are left, by XLA's own count."""
    arrays = [jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32)] + [
        jax.ShapeDtypeStruct((1, 1, 2048, 64), jnp.float32)
    ] * 2

    def flops(name):
        lowered = jax.jit(lambda *x: attend_causally(name, *x)).lower(*arrays)
        return lowered.compile().cost_analysis()["flops"]

    assert 0.5 < flops("chunked") / flops("plain") < 0.6


def facts(**changes):
    return {"length": 256, "head_dim": 64, "dtype": "float32", "documents": False} | changes


def test_a_cpu_takes_the_plain_form():
    assert choose_attention(mesh_of(), **facts()) == "plain"


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_form_that_does_not_compile_here_is_refused(name):
    with pytest.raises(UsageError, match=f"--attention {name}: it does not compile for cpu"):
        check_attention(name, mesh_of(), **facts())
    check_attention("chunked", mesh_of(), **facts())


def test_cudnn_is_not_taken_for_documents():
    """Not even tried: it would be refused in the middle of a trace."""
    with pytest.raises(UsageError, match="heads of 64 and a document mask: leave it out"):
        check_attention("cudnn", mesh_of(), **facts(documents=True))


def test_the_last_resort_is_taken_where_wishes_do_not_compile(monkeypatch):
    monkeypatch.setitem(fast_attention.WISHES, "cpu", ("cudnn", "splash", "chunked"))
    assert choose_attention(mesh_of(), **facts()) == "chunked"
    monkeypatch.setitem(fast_attention.WISHES, "cpu", ("cudnn", "plain", "chunked"))
    assert choose_attention(mesh_of(), **facts()) == "plain"
