"""The certificate: what it measures, what it lets pass, and what it refuses."""

from __future__ import annotations

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

import tiny
from meshlm.conversion.proof import certificate
from meshlm.conversion.proof.certificate import (
    TOLERANCE,
    explain,
    hash_tensor,
    measure,
    probe_tokens,
)
from meshlm.conversion.source import Part
from meshlm.core.errors import MeshLMError
from meshlm.formats.tensor import TensorInfo
from meshlm.model.presets import PRESETS

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


class DictPart(Part):
    def __init__(self, **arrays: np.ndarray) -> None:
        self.key, self._arrays, self.raw = "embedding", arrays, list(arrays)
        self.tensors = {n: TensorInfo(shape=a.shape, dtype=a.dtype) for n, a in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]

    read_raw = read


def make_part(**arrays: np.ndarray) -> DictPart:
    """The embedding's tensors by the last part of their names."""
    return DictPart(**{f"embedding.{name}": array for name, array in arrays.items()})


def reason(name: str, source: DictPart, destination: DictPart, dtype=None) -> str | None:
    info = source.tensors.get(name)
    if info is not None and dtype is not None:
        info = TensorInfo(shape=info.shape, dtype=dtype)
    return explain(name, source, destination, info, {"embedding.bias": "embedding.tokens"})


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=9)))
def test_a_hash_is_that_of_the_bytes_in_c_order(array):
    wanted = hashlib.sha256(array.tobytes()).hexdigest()
    transposed = np.asfortranarray(array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshlm.formats.tensor.BLOCK_NUMBERS", 10)
        assert hash_tensor(array) == hash_tensor(transposed) == wanted
    rounded = hashlib.sha256(array.astype(BFLOAT16).tobytes()).hexdigest()
    if (np.isinf(array.astype(BFLOAT16)) == np.isinf(array)).all():
        assert hash_tensor(array, BFLOAT16, "x") == rounded


def test_probe_tokens_are_rows_of_the_vocabulary():
    tokens = probe_tokens(PRESETS["gpt-j-6b"])
    assert len(tokens) == 32
    # Some of each of the original's eight shards of the table.
    assert {token // 6_300 for token in tokens} == set(range(8))
    assert max(probe_tokens(tiny.CONFIG)) < tiny.CONFIG.vocab_size


def test_explanations():
    table = np.array([[1.0, -0.0], [3.0, 4.0]], np.float32)
    bias = np.array([0.001, -2.0], np.float32)
    both = make_part(tokens=table, bias=bias)
    one = make_part(tokens=table)
    folded = make_part(tokens=table + bias)
    assert reason("embedding.tokens", both, folded) == (
        "the embedding bias was added in float32, stored as float32"
    )
    rounded = make_part(tokens=(table + bias).astype(BFLOAT16))
    assert "stored as bfloat16" in str(reason("embedding.tokens", both, rounded, BFLOAT16))
    assert reason("embedding.bias", both, folded) == "part of the embedding here"
    zeros = make_part(tokens=table, bias=np.zeros(2, np.float32))
    assert reason("embedding.bias", one, zeros) == "zeros: this format always has one"
    narrow = make_part(tokens=table.astype(BFLOAT16))
    assert reason("embedding.tokens", narrow, one) == "the same numbers as float32"
    assert reason("embedding.tokens", make_part(tokens=table + 0.0), one) == (
        "the same numbers; zeros of another sign"
    )


def test_no_explanation_for_other_numbers():
    table = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    bias = np.array([0.5, -2.0], np.float32)
    both = make_part(tokens=table, bias=bias)
    changed = table.copy()
    changed[1, 1] = np.nextafter(np.float32(4), np.float32(5))
    assert reason("embedding.tokens", make_part(tokens=table), make_part(tokens=changed)) is None
    assert reason("embedding.tokens", both, make_part(tokens=table)) is None
    assert reason("embedding.tokens", both, make_part(tokens=changed + bias)) is None
    assert reason("embedding.bias", make_part(tokens=table), both) is None
    assert reason("embedding.tokens", both, make_part(bias=bias)) is None
    # Bits that NaN hides from a comparison of numbers are no explanation either.
    nan = make_part(tokens=np.full((2, 2), np.nan, np.float32))
    assert reason("embedding.tokens", nan, nan) is None


def logits(scale: float = 0.0) -> np.ndarray:
    base = np.linspace(-8, 4, 60).reshape(5, 12)
    return (base + scale * 8 * np.cos(np.arange(60)).reshape(5, 12)).astype(np.float32)


def test_distances_are_relative_to_the_largest_logit():
    distances = measure((logits(), logits()), logits(1e-5), is_lossy=False)
    assert distances["source and destination"].max_difference == 0
    own = distances["destination and MeshLM"]
    assert own.relative == pytest.approx(1e-5, rel=0.05)
    assert own.max_difference == pytest.approx(8e-5, rel=0.05)


@pytest.mark.parametrize(
    ("destination", "own", "pair"),
    [
        (3e-5, 3e-5, "source and destination"),
        (0, 3e-5, "destination and MeshLM"),
        (1.5e-5, -1e-5, "destination and MeshLM"),
        (np.nan, 0, "source and destination"),
        (0, np.nan, "destination and MeshLM"),
    ],
)
def test_numbers_beyond_the_tolerance_fail(destination, own, pair):
    assert TOLERANCE == 2e-5
    with pytest.raises(MeshLMError, match=f"the same numbers: {pair} differ by"):
        measure((logits(), logits(destination)), logits(own), is_lossy=False)


def test_rounding_may_move_the_source_but_not_the_destination():
    distances = measure((logits(), logits(1e-2)), logits(1e-2), is_lossy=True)
    assert distances["source and destination (the rounding)"].relative > 1e-3
    with pytest.raises(MeshLMError, match="destination and MeshLM differ"):
        measure((logits(), logits(1e-2)), logits(0), is_lossy=True)


def test_logits_of_zero_agree_with_themselves():
    zero = np.zeros((2, 3), np.float32)
    assert measure((zero, zero), zero, is_lossy=False)["source and MeshLM"].relative == 0
    with pytest.raises(MeshLMError):
        measure((zero, zero), zero + 1e-9, is_lossy=False)


def test_versions_are_those_installed():
    found = certificate.versions()
    assert found["numpy"] == np.__version__
    assert json.loads(json.dumps(found)) == found
