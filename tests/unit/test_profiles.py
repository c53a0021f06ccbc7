"""Which numbers a profile stands for."""

from __future__ import annotations

import pytest

from meshlm.core.errors import UsageError
from meshlm.generation.profiles import numerics


@pytest.mark.parametrize(
    ("profile", "dtype", "stored", "weights", "products"),
    [
        ("fast", None, "float32", None, "float32"),
        ("fast", None, "bfloat16", None, "bfloat16"),
        ("fast", None, "float16", None, "float32"),
        ("fast", "bfloat16", "float32", "bfloat16", "bfloat16"),
        ("hf", None, "float32", "float32", "float32"),
        ("hf", None, "bfloat16", "bfloat16", "bfloat16"),
        ("mtj-2021", None, "float32", "bfloat16", "float32"),
        ("mtj-2021", None, "bfloat16", None, "float32"),
        ("mtj-2021", "float32", "float32", "float32", "float32"),
    ],
)
def test_weights_and_products(profile, dtype, stored, weights, products):
    found = numerics(profile, dtype, stored)
    assert (found.weights, found.compute.dtype) == (weights, products)
    assert found.filters_first == (profile == "mtj-2021")
    assert found.compute.rounded == (profile == "hf")
    assert found.compute.rotary_table == ("float32" if profile == "hf" else "float64")


def test_another_type_is_refused():
    with pytest.raises(UsageError, match="--dtype int8: choose one of float32, bfloat16"):
        numerics("fast", "int8", "float32")


def test_another_name_is_refused():
    with pytest.raises(UsageError, match="--profile exact: choose one of fast, hf, mtj-2021"):
        numerics("exact", None, "float32")
