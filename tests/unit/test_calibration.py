"""Published runs are reproduced by one fitted number, and stated as their publishers state them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from meshlm.planning import prediction
from meshlm.planning.calibration import (
    RUNS,
    SLICED_RUNS,
    PublishedRun,
    calibrate,
    calibration_table,
    mean_error,
)
from meshlm.planning.topology import find_topology

FITTED = tuple(run for run in RUNS if run.fitted)
OTHERS = tuple(run for run in RUNS if not run.fitted)


def name(run: PublishedRun) -> str:
    return f"{run.name} on {run.topology}"


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_within_a_fifth(run):
    assert abs(calibrate(run).error) < 0.2


@pytest.mark.parametrize("run", SLICED_RUNS, ids=name)
def test_several_slices(run):
    """What the network between them carries hides; what else many of them lose is not predicted."""
    assert abs(calibrate(run).error) < (0.25 if run.topology.startswith("32x") else 0.15)


def test_the_four_of_the_fit_and_the_others():
    assert [(run.topology.partition(":")[0], round(run.mfu, 2)) for run in FITTED] == [
        ("v3", 0.47),
        ("v5e", 0.61),
        ("v5p", 0.71),
        ("v6e", 0.47),
    ]
    assert len(OTHERS) >= 6
    # The number is the best for the four, and no worse for those that it has not seen.
    assert abs(mean_error(FITTED)) < 0.01
    assert abs(mean_error(OTHERS)) < 0.05


def test_another_efficiency_would_be_seen(monkeypatch):
    monkeypatch.setattr(prediction, "PRODUCT_EFFICIENCY", 0.6)
    assert abs(mean_error(FITTED)) > 0.15
    assert max(abs(calibrate(run).error) for run in FITTED) > 0.2


@pytest.mark.parametrize(
    ("run", "flops_per_s", "tokens_per_s"),
    [
        # What the recipes print: TFLOP/s and tokens/s of a device. Their quotient is FLOPs a token.
        (RUNS[3], 431.981e12, 7776.813),
        (RUNS[-2], 413.433e12, 7138.890),
        (RUNS[-1], 417.397e12, 7207.336),
    ],
    ids=["Mistral-7B", "Llama-3.1-8B on 8", "Llama-3.1-8B on 256"],
)
def test_shapes_have_the_flops_that_were_published(run, flops_per_s, tokens_per_s):
    assert run.published_flops() == pytest.approx(flops_per_s / tokens_per_s, rel=0.005)
    peak = find_topology(run.topology).facts.peak_flops
    assert run.mfu == pytest.approx(flops_per_s / peak, rel=0.005)
    rows = run.rows_per_device * run.model.context_length
    assert run.setup.tokens == rows * find_topology(run.topology).num_devices


@pytest.mark.parametrize(
    ("run", "tflops_per_s"),
    [
        (RUNS[1], 120),
        (RUNS[2], 328),
        (RUNS[4], 132),
        (RUNS[5], 118),
        (RUNS[6], 110),
        (RUNS[7], 323),
        (SLICED_RUNS[0], 117),
        (SLICED_RUNS[-1], 91),
    ],
    ids=lambda value: name(value) if isinstance(value, PublishedRun) else str(value),
)
def test_maxtexts_mfu_is_of_our_data_sheet(run, tflops_per_s):
    peak = find_topology(run.topology).facts.peak_flops
    assert run.mfu == pytest.approx(tflops_per_s * 1e12 / peak, abs=0.006)


@pytest.mark.parametrize("run", RUNS + SLICED_RUNS, ids=name)
def test_the_setup_is_whole(run):
    setup, topology = run.setup, find_topology(run.topology)
    assert setup.mesh.num_devices == topology.num_devices
    # Rows a device; under tensor parallelism the devices of a group have all of theirs.
    shared = setup.mesh.model if run.sharding == "fsdp-tensor" else 1
    assert setup.rows == run.rows_per_device * shared
    assert "/" in run.source or "config" in run.source


def test_the_table():
    lines = calibration_table().splitlines()
    assert len(lines) == 2 + len(RUNS)
    assert len({line.count("|") for line in lines}) == 1
    assert sum("| yes |" in line for line in lines) == 4
    assert "47.3%" in lines[2]
    assert "+" in "".join(lines)


def test_a_block_in_series_costs_more_under_tensor_parallelism():
    parallel = dataclasses.replace(RUNS[2], again=0.0)
    waited = calibrate(parallel).prediction.exposed_s
    assert waited > 0.05 * calibrate(parallel).prediction.step_s


def test_the_table_in_the_docs_is_this_one():
    page = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
    assert calibration_table() in page.read_text()
    assert calibration_table(SLICED_RUNS) in page.read_text()
    assert f"{prediction.PRODUCT_EFFICIENCY} x peak" in page.read_text()
