"""A plan: its JSON, its verdict, its words; without a compiler, and with what one would say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from meshlm.core.errors import UsageError
from meshlm.model.flops import flops_per_token
from meshlm.planning import checking, plan, search
from meshlm.planning.checking import PlanCheck, compare
from meshlm.planning.compiling import Collective, Compiled
from meshlm.planning.plan import make_plan
from meshlm.planning.text import render_plan, render_verdict
from meshlm.planning.topology import find_topology
from planned import GPTJ, setup_of

V3 = find_topology("v3:16x8")
POD = setup_of(accumulate=8, data=32, model=8)
ASKED_FOR = (
    "devices",
    "device_kind",
    "fits",
    "peak_bytes",
    "argument_bytes",
    "temp_bytes",
    "flops",
    "model_flops",
    "predicted_step_s",
    "predicted_mfu",
    "compile_s",
    "collectives",
)
FOUND = Compiled(
    fits=True,
    argument_bytes=289_000_000,
    temp_bytes=3_600_000_000,
    peak_bytes=3_889_000_000,
    flops=1.86e14,
    bytes_accessed=8e11,
    collectives=(
        Collective(
            op="all-reduce",
            axes=("model",),
            dtype="f32",
            bytes=67_108_864,
            count=224,
            group_size=8,
            where="forward",
        ),
    ),
    compile_s=37.0,
    jax_version="0.12.0.1",
    libtpu_version="0.0.50.1",
)
REFUSED = Compiled(
    fits=False,
    message="RESOURCE_EXHAUSTED: total (18.36G) exceeds available HBM (15.48G)",
    available_bytes=int(15.48 * 2**30),
    compile_s=20.0,
)


@pytest.fixture
def compiled(monkeypatch):
    """Has the compiler say something, for topologies that it compiles for; a list of its setups."""
    asked = []

    def use(*answers: Compiled):
        left = list(answers)

        def answer(setup, topology):
            asked.append(setup)
            return left.pop(0) if len(left) > 1 else left[0]

        monkeypatch.setattr(plan, "compile_setup", answer)
        return asked

    return use


def test_json_by_formula():
    found = json.loads(json.dumps(make_plan(POD, V3, compile=False).to_json()))
    assert set(ASKED_FOR) <= set(found)
    assert found["devices"] == 256
    assert found["device_kind"] == "TPU v3"
    assert found["figures_from"] == "formula"
    assert found["fits"] is True
    assert found["compile_s"] is None
    assert found["parameters"] == 6_050_882_784
    assert found["model_flops"] * 256 == flops_per_token(GPTJ, 2048) * 2**20
    assert found["peak_bytes"] == found["argument_bytes"] + found["temp_bytes"]
    assert found["peak_bytes"] == found["formula"]["total_bytes"]
    for collective in found["collectives"]:
        assert {"op", "count", "bytes", "axes"} <= set(collective)
    assert 0.2 < found["predicted_mfu"] < 0.8
    assert found["predicted_step_s"] == pytest.approx(
        found["model_flops"] / found["predicted_mfu"] / found["peak_flops_per_s"]
    )


def test_json_by_the_compiler(compiled):
    asked = compiled(FOUND)
    found = make_plan(POD, dataclasses.replace(V3, compiles=True)).to_json()
    assert asked == [POD]
    assert found["figures_from"] == "compiler"
    for name in ("argument_bytes", "temp_bytes", "peak_bytes", "flops", "compile_s"):
        assert found[name] == getattr(FOUND, name)
    (collective,) = found["collectives"]
    assert (collective["op"], collective["count"]) == ("all-reduce", 224)
    assert found["fits"] is True


def test_what_is_not_compiled_for_is_planned_by_formula(compiled):
    asked = compiled(FOUND)
    assert make_plan(setup_of(data=64), find_topology("H100:64")).compiled is None
    assert make_plan(POD, V3, compile=False).compiled is None
    assert asked == []


def test_refused_by_the_compiler(compiled):
    compiled(REFUSED)
    topology = dataclasses.replace(V3, compiles=True)
    found = make_plan(setup_of(data=32, model=8), topology)
    assert found.fits is False
    said = found.to_json()
    assert said["fits"] is False
    assert "18.36G" in said["message"]
    assert said["available_bytes"] == REFUSED.available_bytes
    # Figures of what was not compiled are the formula's.
    assert said["figures_from"] == "formula"
    assert said["peak_bytes"] > said["available_bytes"]
    assert "18.36G" in render_verdict(found, None)


def test_the_nearest_that_fits_by_formula():
    found = make_plan(setup_of(data=32, model=8), V3, compile=False)
    assert found.fits is False
    nearest = search.nearest_that_fits(found, compile=False)
    assert nearest is not None
    assert nearest.fits
    # More parts are the least that can be changed.
    assert nearest.setup.mesh == found.setup.mesh
    assert nearest.setup.step.compute == found.setup.step.compute
    assert nearest.setup.step.accumulate > 1
    verdict = render_verdict(found, nearest)
    assert verdict.startswith("does not fit: the nearest that fits is --sharding fsdp-tensor")
    assert f"--accumulate {nearest.setup.step.accumulate}" in verdict


def test_the_nearest_that_fits_is_compiled_too(compiled):
    topology = dataclasses.replace(V3, compiles=True)
    asked = compiled(REFUSED, REFUSED, FOUND)
    found = make_plan(setup_of(data=32, model=8), topology)
    nearest = search.nearest_that_fits(found)
    assert nearest is not None
    assert nearest.compiled is FOUND
    assert len(asked) == 3
    assert len(set(asked)) == 3


def test_nothing_fits():
    one = find_topology("v3:1x1")
    found = make_plan(setup_of(batch_size=2, data=2), one, compile=False)
    assert found.fits is False
    assert search.nearest_that_fits(found, compile=False) is None
    assert "nothing near it fits" in render_verdict(found, None)


def test_memory_that_is_not_known():
    here = find_topology("here")
    unknown = dict.fromkeys(("peak_flops", "bandwidth_bytes_per_s", "memory_bytes"))
    here = dataclasses.replace(here, facts=dataclasses.replace(here.facts, **unknown))
    found = make_plan(setup_of(batch_size=1), here, compile=False)
    assert found.fits is None
    assert "no verdict" in render_verdict(found, None)
    assert found.prediction is None
    assert found.to_json()["predicted_mfu"] is None
    assert "no data sheet" in render_plan(found)
    by_compiler = dataclasses.replace(found, compiled=FOUND)
    assert by_compiler.fits is None
    assert "no verdict" in render_verdict(by_compiler, None)


def test_a_mesh_larger_than_the_topology():
    with pytest.raises(UsageError, match=r"--mesh.* of 512 devices: v3:16x8 has 256"):
        make_plan(setup_of(data=64, model=8), V3, compile=False)
    with pytest.raises(UsageError, match="does not divide among 32 devices"):
        make_plan(setup_of(batch_size=100, data=32, model=8), V3, compile=False)
    with pytest.raises(UsageError, match=r"choose --mesh\.\* that divide"):
        make_plan(setup_of(data=3, batch_size=3), V3, compile=False)


def test_no_run_ends_for_want_of_a_plan(monkeypatch):
    def fail(*given, **named):
        raise ZeroDivisionError

    monkeypatch.setattr(checking, "make_plan", fail)
    assert checking.check_here(POD).plan is None


def test_exchanges_between_slices_have_a_row_of_their_own(compiled):
    (within,) = FOUND.collectives
    within = dataclasses.replace(within, axes=("replica",), group_size=2)
    between = dataclasses.replace(within, between_slices=True, count=1)
    compiled(dataclasses.replace(FOUND, collectives=(within, between)))
    two = dataclasses.replace(find_topology("2xv3:16x8"), compiles=True)
    setup = setup_of(sharding="replica-fsdp", replica=4, data=128)
    rows = [line.split("  ") for line in render_plan(make_plan(setup, two)).splitlines()]
    rows = [[cell.strip() for cell in row if cell] for row in rows if row[0] == "all-reduce"]
    assert [row[1:] for row in rows] == [
        ["replica", "224", "15.032 GB"],
        ["replica between slices", "1", "0.067 GB"],
    ]


def test_words(compiled):
    compiled(FOUND)
    text = render_plan(make_plan(POD, dataclasses.replace(V3, compiles=True)))
    assert "gpt-j-6b: 6,050,882,784 parameters on 256 x TPU v3" in text
    assert "1,048,576 tokens a step" in text
    assert "predicted, not measured" in text
    assert "MFU" in text
    assert "of 61.5 TFLOP/s a device" in text
    assert "compiled in 37 s (JAX 0.12.0.1, libtpu 0.0.50.1)" in text
    lines = text.splitlines()
    (arguments,) = [line for line in lines if line.startswith("= arguments")]
    assert arguments.split()[2:] == ["0.289", "GB", "0.289", "GB"]
    (sums,) = [line for line in lines if line.startswith("all-reduce")]
    # Seven eighths of 64 MiB twice, 224 times.
    assert sums.split() == [
        "all-reduce",
        "model",
        "224",
        f"{2 * 7 / 8 * 0.067108864 * 224:.3f}",
        "GB",
    ]


def test_the_first_steps_against_the_plan(monkeypatch):
    found = make_plan(POD, V3, compile=False)
    assert found.prediction is not None
    monkeypatch.setattr(checking, "measured_peak_bytes", lambda: 2 * found.peak_bytes)
    check = PlanCheck(found)
    step_s = found.prediction.step_s / 1.25
    lines = [check.add(seconds) for seconds in (99.0, 99.0, *[step_s] * 4, 99.0, step_s)]
    assert [line is not None for line in lines] == [False] * 6 + [True, False]
    assert "error +25%" in lines[6]
    assert "error -50%" in lines[6]
    assert PlanCheck(None).add(1.0) is None
    line = compare(dataclasses.replace(found, prediction=None), 2.0, None)
    flops = flops_per_token(GPTJ, 2048) * 2**20 / 256 / 2.0
    assert "no step is predicted for TPU v3" in line
    assert f"measured 2 s, {flops / 1e9:,.1f} GFLOP/s a device" in line
