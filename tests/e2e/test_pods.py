"""bench/pods.py: its tiny study end to end, and what is kept of the large one."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The published count of the original's parameters, copies of its norms and shares of its biases
# included, and the shape of what it trained on.
PARAMETERS, LAYERS, SHARDS, PARTS = 6_053_381_344, 28, 8, 16
STREAM_BYTES = 2048 * 4096 * 4


@functools.cache
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pods_tables", ROOT / "bench/pods_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kept() -> dict:
    return json.loads(tables().latest_result().read_text())


def test_the_page_has_the_tables_of_the_newest_result():
    page = (ROOT / "docs" / "pods.md").read_text()
    assert tables().fill(page, kept()) == page


def test_the_originals_exchanges_are_those_that_a_hand_counts():
    """Three sums of the stream a layer, one of embedding and head; each gradient once a step."""
    (plan,) = kept()["original"]["plans"]
    sent: dict[tuple[str, str], int] = {}
    for found in plan["compiled"]["collectives"]:
        key = (found["op"], *found["axes"], found["dtype"])
        sent[key] = sent.get(key, 0) + found["bytes"] * found["count"]
    streams = (3 * LAYERS + 2) * PARTS * STREAM_BYTES
    # Beside them there are a few rows of numbers, of the loss.
    assert streams <= sent["all-reduce", "model", "f32"] < streams * 1.0001
    gradients = 2 * PARAMETERS // SHARDS
    assert sent["all-reduce", "data", "bf16"] == pytest.approx(gradients, rel=1e-3)


def test_its_arguments_are_weights_and_moments_of_a_whole_copy():
    (plan,) = kept()["original"]["plans"]
    assert plan["argument_bytes"] == pytest.approx(3 * 4 * PARAMETERS / SHARDS, rel=1e-3)


def test_a_sum_over_eight_devices_sends_seven_eighths_twice():
    base = {"dtype": "f32", "where": "forward", "overlapped": False}
    found = [
        {"op": "all-reduce", "axes": ["model"], "bytes": 80, "count": 3, "group_size": 8, **base},
        {"op": "all-gather", "axes": ["data"], "bytes": 80, "count": 2, "group_size": 4, **base},
    ]
    wire = tables().wire({"compiled": {"collectives": found}})
    assert wire == {("all-reduce", "model"): (3, 420.0), ("all-gather", "data"): (2, 120.0)}


@pytest.mark.long
def test_the_tiny_study():
    pytest.importorskip("libtpu")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "bench/pods.py"), "--small"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert {"original", "ours", "pods", "depth"} <= result.keys()
    page = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in tables().TABLES)
    filled = tables().fill(page, result)
    assert filled.count("the original") >= 3
    (theirs,) = result["original"]["plans"]
    for plan in (theirs, *result["ours"]["plans"]):
        # The products of the model at least, and those computed again.
        assert 1 < plan["flops"] / plan["model_flops"] < 4
        assert plan["predicted_step_s"] > 0
        assert plan["fits"]
    # The compiled step and the formula mean the same arguments.
    for plan in result["ours"]["plans"]:
        formula = plan["formula"]["weights_bytes"] + plan["formula"]["optimizer_bytes"]
        assert plan["argument_bytes"] == pytest.approx(formula, rel=0.1)
