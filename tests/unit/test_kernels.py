"""The compiled kernels: where they come from, and doing without; numbers: test_quantize.py."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from meshlm.core import kernels
from meshlm.generation import DecodeModel, Generator, SamplingConfig
from meshlm.model.params import unstack_blocks
from meshlm.model.quantize import quantise_params
from meshlm.ops import streamed
from tiny import CONFIG, F32, draw_params, relative_max

build = kernels._library
find = kernels._find.__wrapped__


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    return tmp_path / "meshlm" / "kernels"


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.skipif(not kernels.kernels().ready, reason=kernels.kernels().detail)
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
    assert find() == kernels.Kernels(ready=False, detail="there is no C compiler (cc) on PATH")


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
    assert find().detail == f"{cache} can be written to by others: chmod 700 it"


def test_a_cache_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not find().ready


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert find() == kernels.Kernels(ready=False, detail="MESHLM_KERNELS=off")


@pytest.mark.skipif(not kernels.kernels().ready, reason=kernels.kernels().detail)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_decoding_with_them_is_decoding_without(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads of 16 dims, so that attention takes its kernel too.
    config = dataclasses.replace(CONFIG, d_model=32, num_heads=2, head_dim=16, rotary_dim=8)
    params = unstack_blocks(draw_params(config, scale=0.1))
    params = quantise_params(params) if dtype == "int8" else params
    compute = dataclasses.replace(F32, dtype="float32" if dtype == "int8" else dtype)
    samples = []
    # The vocabulary's bound is part of what is compiled: nothing is taken from the other.
    for allowed in (config.vocab_size, config.vocab_size - 1):
        model = DecodeModel.prepare(params, config, compute, allowed_vocab=allowed)
        generator = Generator(model, end_of_text_id=None, token_bytes=lambda _: b"")
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
