"""`meshlm plan`: its words, its JSON, its mistakes; by formula, and with a compiler."""

from __future__ import annotations

import json
import re

import pytest

from runs import one_line

pytestmark = pytest.mark.timeout(900)
SIX = ("plan", "--preset", "gpt-j-6b", "--topology", "v3:16x8")
TPUS = ("v2:4x4", "v3:4x4", "v4:4x4x4", "v5e:4x4", "v5p:4x4x4", "v6e:4x4", "v7x:4x4x4")
TOPOLOGIES = (*TPUS, "A100:64", "H100:64", "H200:64", "B200:64")
POD = (*SIX, "--mesh.data", "32", "--mesh.model", "8", "--batch-size", "512", "--seq-len", "2048")


def planned(meshlm, *words) -> dict:
    code, out, err = meshlm(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_by_formula(meshlm):
    code, out, err = meshlm(*POD, "--accumulate", "8", "--no-compile")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("gpt-j-6b: 6,050,882,784 parameters on 256 x TPU v3")
    assert lines[-1].startswith("fits: ")
    assert "predicted, not measured" in out
    assert "of 61.5 TFLOP/s a device" in out


def test_what_does_not_fit_is_an_answer(meshlm):
    code, out, _ = meshlm(*POD, "--no-compile")
    assert code == 0
    last = out.splitlines()[-1]
    assert last.startswith("does not fit: the nearest that fits is ")
    # The advice, taken, fits.
    options = last.removeprefix("does not fit: the nearest that fits is ").partition(" (")[0]
    found = planned(meshlm, *SIX, *options.split(), "--no-compile")
    assert found["fits"] is True
    both = planned(meshlm, *POD, "--no-compile")
    assert both["fits"] is False
    assert both["nearest"]["fits"] is True
    assert both["nearest"]["peak_bytes"] == found["peak_bytes"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_by_formula(meshlm, topology):
    words = ("plan", "--preset", "1.3b", "--topology", topology, "--no-compile")
    found = planned(meshlm, *words)
    assert found["mesh"]["data"] == found["devices"] >= 16
    assert found["batch_size"] == found["devices"]
    assert 0.05 < found["predicted_mfu"] < 0.8
    assert found["predicted_step_s"] > 0
    assert found["model_flops"] * found["devices"] == pytest.approx(
        2048 * found["batch_size"] * 6 * (1.315e9 + 24 * 2048 * 2048), rel=0.01
    )
    assert found["peak_bytes"] < found["available_bytes"]


def test_a_search(meshlm):
    words = (*SIX, "--search", "--batch-size", "512", "--no-compile")
    code, out, err = meshlm(*words)
    assert (code, err) == (0, "")
    assert "Predictions, not measurements; MFU of 61.5 TFLOP/s a device." in out
    found = planned(meshlm, *words)["plans"]
    paces = [plan["predicted_step_s"] / plan["tokens"] for plan in found]
    assert paces == sorted(paces)
    assert all(plan["fits"] for plan in found)
    assert len(found) > 10


def test_the_step_is_that_of_a_run(meshlm):
    """Small: nothing is computed again where weights are whole, and few layers are unrolled."""
    one = planned(meshlm, "plan", "--preset", "125m", "--topology", "H100:1", "--no-compile")
    assert (one["compute"]["remat"], one["compute"]["scan_layers"]) == ("none", False)
    split = planned(meshlm, "plan", "--preset", "350m", "--topology", "H100:8", "--no-compile")
    assert (split["compute"]["remat"], split["compute"]["scan_layers"]) == ("minimal", True)


@pytest.mark.parametrize(
    ("words", "mesh"),
    [
        ((), (1, 16, 1)),
        (("--sharding", "tensor"), (1, 1, 16)),
        (("--sharding", "data"), (16, 1, 1)),
        (("--sharding", "tensor", "--mesh.model", "8"), (1, 1, 8)),
    ],
)
def test_the_mesh_is_that_of_the_rules(meshlm, words, mesh):
    plan = ("plan", "--preset", "1.3b", "--topology", "v5e:4x4", "--no-compile")
    assert tuple(planned(meshlm, *plan, *words)["mesh"].values()) == mesh


def test_several_slices(meshlm):
    plan = ("plan", "--preset", "1.3b", "--no-compile", "--topology")
    found = planned(meshlm, *plan, "2xv5e:4x4", "--sharding", "replica-fsdp", "--batch-size", "64")
    assert (found["devices"], *found["mesh"].values()) == (32, 2, 16, 1)
    (between,) = [c for c in found["collectives"] if "replica" in c["axes"]]
    own = 4 * found["parameters"] / 16
    assert (between["op"], between["count"]) == ("all-reduce", 1)
    assert between["bytes"] == pytest.approx(own, rel=0.01)
    assert found["predicted_interconnect_s"]["replica"] == pytest.approx(own / 3.125e9, rel=0.02)
    code, out, _ = meshlm(*plan, "2xv5e:4x4")
    assert code == 0
    assert "32 x TPU v5 lite in 2 slices" in out
    assert "3.12 GB/s each way from a device to other slices" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--preset", "gpt-j-7b"), "--preset gpt-j-7b: did you mean gpt-j-6b?"),
        (("--preset", "1.3b", "--topology", "v9:4x4"), "--topology v9:4x4: give chips"),
        (("--preset", "1.3b", "--topology", "v5e:4"), "--topology v5e:4: give the chips"),
        (("--preset", "1.3b", "--topology", "2xH100:8"), "--topology 2xH100:8: give chips"),
        (("--preset", "1.3b", "--mesh.data", "99"), "--mesh.* of 99 devices"),
        (
            ("--preset", "1.3b", "--topology", "2xv5e:4x4", "--mesh.data", "32"),
            "--mesh.replica 1 of 32 devices: 2xv5e:4x4 has 32 in 2 slices",
        ),
        (("--preset", "1.3b", "--seq-len", "4096"), "--seq-len 4096: the model's context is 2048"),
        (("--preset", "1.3b", "--batch-size", "0"), "--batch-size 0: give 1 or more"),
        (("--preset", "1.3b", "--vocab-size", "-1"), "vocab_size is -1: give a positive number"),
        (("--preset", "test", "--accumulate", "3", "--batch-size", "8"), "give a multiple of 24"),
        (
            ("--preset", "1.3b", "--topology", "H100:8", "--attention", "splash"),
            "--attention splash: its kernel is for TPUs from v4 on, and H100:8 is NVIDIA H100",
        ),
        ((), "missing --preset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(meshlm, words, said):
    code, out, err = meshlm("plan", *words, "--no-compile")
    assert (code, out) == (2, "")
    assert said in one_line(err)


def test_this_machine_is_compiled_for(meshlm):
    words = ("plan", "--preset", "test", "--batch-size", "8", "--seq-len", "32")
    found = planned(meshlm, *words, "--mesh.data", "2", "--mesh.model", "2")
    assert found["figures_from"] == "compiler"
    assert found["device_kind"] == "cpu"
    assert found["devices"] == 4
    assert found["argument_bytes"] == pytest.approx(found["formula"]["weights_bytes"] * 3, rel=0.02)
    assert found["flops"] >= found["model_flops"] * 0.8
    assert found["compile_s"] > 0
    assert {"all-gather", "all-reduce"} <= {c["op"] for c in found["collectives"]}
    assert 0 < found["predicted_mfu"] < 1


def test_a_run_tells_what_its_first_steps_were_next_to_the_plan(run_of_10):
    lines = (run_of_10 / "log.txt").read_text().splitlines()
    (told,) = [line for line in lines if "plan: " in line]
    assert re.search(r"plan: step predicted [\d.e-]+ s, measured .* \(error [+-]\d+%\)", told)
    written = (run_of_10 / "metrics.jsonl").read_text().splitlines()
    metrics = [line for line in map(json.loads, written) if "step_s" in line]
    measured = sorted(line["step_s"] for line in metrics[2:7])[2]
    assert f"measured {measured:.3g} s" in told


@pytest.mark.long
def test_a_pod_is_compiled_for(meshlm):
    pytest.importorskip("libtpu")
    found = planned(meshlm, *POD, "--accumulate", "8")
    assert found["figures_from"] == "compiler"
    assert found["fits"] is True
    formula = found["formula"]
    assert found["argument_bytes"] == pytest.approx(
        formula["weights_bytes"] + formula["optimizer_bytes"] + formula["batch_bytes"], rel=0.01
    )
    assert found["peak_bytes"] == pytest.approx(formula["total_bytes"], rel=0.3)
    assert found["predicted_step_s"] > 0


@pytest.mark.long
def test_a_pod_whose_compiler_refuses(meshlm):
    pytest.importorskip("libtpu")
    words = ("plan", "--preset", "gpt-j-6b", "--topology", "v3:4x4", "--mesh.data", "32")
    found = planned(meshlm, *words, "--batch-size", "512", "--sharding", "fsdp", "--remat", "none")
    assert found["fits"] is False
    assert "exceed" in found["message"]
    assert found["nearest"] is None or found["nearest"]["figures_from"] == "compiler"
