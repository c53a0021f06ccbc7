"""The compiled kernels: where they come from, and doing without; numbers: test_quantize.py."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.core import kernels
from meshlm.core.kernels import Kernels
from meshlm.generation import DecodeModel, Generator, SamplingConfig
from meshlm.model.params import unstack_blocks
from meshlm.model.quantize import quantise_params
from meshlm.ops.attention import plain_attend_to_cache
from meshlm.ops.cpu import library, streamed
from meshlm.ops.cpu.library import LIBRARY
from meshlm.ops.linear import dots
from meshlm.ops.weights import Dense, Int8
from tiny import CONFIG, F32, draw_params, relative_max


def build() -> Path:
    return kernels._build(LIBRARY)


def find(library: kernels.KernelLibrary = LIBRARY) -> Kernels:
    """What the library's first use finds, whatever an earlier one found."""
    return kernels._load.__wrapped__(library)


needs_kernels = pytest.mark.skipif(not library.kernels().ready, reason=library.kernels().detail)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(LIBRARY.switch, raising=False)
    return tmp_path / "meshlm" / "kernels"


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@needs_kernels
def test_the_library_is_built_once_where_only_its_owner_writes(cache: Path) -> None:
    path = build()
    assert path.parent == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    built = path.stat().st_mtime_ns
    assert build() == path
    assert path.stat().st_mtime_ns == built
    assert list(cache.iterdir()) == [path], "nothing else is left behind"


def test_without_a_compiler_the_reason_is_told(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find() == Kernels(ready=False, detail="there is no C compiler (cc) on PATH")


def test_a_compiler_that_fails_is_quoted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, "echo 'cc: no such option' >&2; exit 1")
    found = find()
    assert not found.ready
    assert found.detail.endswith("fails: cc: no such option")
    assert not list(cache.iterdir())


def test_a_folder_that_others_may_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert find().detail.startswith(f"{cache}: others can write there")


def test_a_cache_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not find().ready


def test_a_user_without_a_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(LIBRARY.switch, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "here")
    assert "no cache folder" in find().detail
    assert not list(tmp_path.iterdir())


@needs_kernels
@pytest.mark.parametrize("error", [AttributeError, RuntimeError, ValueError])
def test_a_library_that_jax_does_not_take_is_no_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **more) -> None:
        raise error("another version")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    found = find()
    assert not found.ready
    assert found.detail.endswith(".so: another version")


@needs_kernels
def test_a_library_without_the_symbol_is_no_error() -> None:
    found = find(dataclasses.replace(LIBRARY, targets=("meshlm_nothing",)))
    assert not found.ready
    assert "meshlm_nothing" in found.detail


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY.switch, "off")
    assert find() == Kernels(ready=False, detail="MESHLM_KERNELS=off")


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_decoding_with_them_is_decoding_without(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads of 16 dims, so that attention takes its kernel too.
    config = dataclasses.replace(CONFIG, d_model=32, num_heads=2, head_dim=16, rotary_dim=8)
    params = unstack_blocks(draw_params(config, scale=0.1))
    params = quantise_params(config, params) if dtype == "int8" else params
    compute = dataclasses.replace(F32, dtype="float32" if dtype == "int8" else dtype)
    samples = []
    # The vocabulary's bound is part of what is compiled: nothing is taken from the other.
    for allowed in (config.vocab_size, config.vocab_size - 1):
        model = DecodeModel.prepare(params, config, compute, allowed_vocab=allowed)
        generator = Generator(model, end_ids=(), start_id=None, token_bytes=lambda _: b"")
        options = SamplingConfig(max_tokens=12, temperature=0.0)
        samples.append(generator.generate([[1, 2, 3], [4] * 9], options))
        monkeypatch.setattr(streamed, "is_faster", lambda num_rows: False)
    for (with_them,), (without,) in zip(*samples, strict=True):
        close = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.03}[dtype]
        same = next(
            (
                i
                for i, (a, b) in enumerate(zip(with_them.tokens, without.tokens, strict=True))
                if a != b
            ),
            12,
        )
        assert same >= 4, "greedy tokens part early"
        first, second = (np.array(sample.logprobs[:same]) for sample in (with_them, without))
        assert relative_max(first, second) < close


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@needs_kernels
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_attention_of_what_is_not_finite_is_nan_as_xlas_is(where: str, value: float) -> None:
    q, keys, values = draw(2, 1, 2, 16), draw(2, 2, 5, 16, seed=1), draw(2, 2, 5, 16, seed=2)
    # Of the first row and head alone; positive, so that the score is inf and not -inf.
    q, keys = (x.at[0].set(jnp.abs(x[0])) for x in (q, keys))
    if where == "query":
        q = q.at[0, 0, 0, 3].set(value)
    else:
        keys = keys.at[0, 0, 1, 3].set(value)
    lengths = jnp.asarray([3, 5])
    mask = jnp.asarray((np.arange(5) < np.asarray(lengths)[:, None])[:, None, None])
    wanted = np.asarray(plain_attend_to_cache(q, keys, values, mask))[:, 0]
    found = np.asarray(jax.jit(streamed.attend)(q[:, 0], keys, values, lengths))
    assert np.isnan(wanted[0, 0]).all(), "XLA gives NaN"
    assert np.isnan(found[0, 0]).all()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_unused_places_changes_no_bit(dtype: str) -> None:
    q, keys, values = (
        x.astype(dtype) for x in (draw(2, 2, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 16, seed=2))
    )
    lengths = jnp.asarray([3, 9])
    unused = (np.arange(9) >= np.asarray(lengths)[:, None])[:, None, :, None]
    dirty = [jnp.where(unused, jnp.nan, x) for x in (keys, values)]
    run = jax.jit(streamed.attend)
    np.testing.assert_array_equal(run(q, *dirty, lengths), run(q, keys, values, lengths))


@needs_kernels
def test_threads_may_call_them_at_once() -> None:
    weight = Int8.from_array(draw(300, 256, seed=1))
    keys, values = draw(3, 4, 200, 64, seed=2), draw(3, 4, 200, 64, seed=3)
    lengths = jnp.asarray([1, 77, 200])

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole, exact = dots([(x, weight, 1), (x, Dense(keys[0, 0].repeat(4, 1)), 1)], streamed=True)
        return whole, exact, streamed.attend(x.reshape(3, 4, 64), keys, values, lengths)

    inputs = [draw(3, 256, seed=seed) for seed in range(3)]
    wanted = [[np.asarray(y) for y in run(x)] for x in inputs]

    def calls(x: jax.Array) -> list[list[np.ndarray]]:
        return [[np.asarray(y) for y in run(x)] for _ in range(100)]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for results, right in zip(pool.map(calls, inputs), wanted, strict=True):
            for found in results:
                for y, reference in zip(found, right, strict=True):
                    np.testing.assert_array_equal(y, reference)


@needs_kernels
@pytest.mark.parametrize("function", ["malloc(n)", "calloc(n, m)"])
def test_without_memory_the_call_fails_and_not_the_process(
    function: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "none.h"
    header.write_text(f"#include <stdlib.h>\n#define {function} NULL\n")
    monkeypatch.setattr(kernels, "_FLAGS", (*kernels._FLAGS, "-include", str(header)))
    built = ctypes.CDLL(str(build()))
    for name in ("PRODUCTS", "ATTENTION"):
        call = getattr(library, name)
        own = f"{call}_without_{function}"
        target = jax.ffi.pycapsule(getattr(built, call))
        jax.ffi.register_ffi_target(own, target, platform="cpu")
        monkeypatch.setattr(streamed, name, own)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(
            streamed.products([Int8.from_array(draw(3, 16)).streamed_operands(draw(2, 16), 1)])
        )
    lengths, keys = jnp.asarray([1]), draw(1, 2, 4, 16)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(streamed.attend(draw(1, 2, 16), keys, keys, lengths))
