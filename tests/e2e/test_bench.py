"""The benches: all sides compute a tiny shape and the line of JSON adds up."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 256
TINY = ["--layers", "2", "--d-model", "64", "--heads", "4", "--rotary-dim", "8"]
TINY += ["--vocab", str(VOCAB), "--batch-size", "2", "--seq-len", "32"]


def bench(*arguments: str, script: str = "train") -> subprocess.CompletedProcess[str]:
    # A user's environment, without the eight virtual devices of the suite.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    return subprocess.run(
        [sys.executable, str(ROOT / f"bench/{script}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def torch_python(*more: str) -> str:
    """The interpreter with torch: the parity environment's, which `make test` prepares."""
    needed = ("torch", "transformers", *more)
    look = f"from importlib.util import find_spec as f; exit(not all(map(f, {needed})))"
    for python in (sys.executable, str(ROOT / ".venv-parity/bin/python")):
        if os.access(python, os.X_OK) and subprocess.run([python, "-c", look]).returncode == 0:
            return python
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, but no interpreter here has {', '.join(needed)}")
    pytest.skip(f"no interpreter here has {', '.join(needed)}")


@pytest.mark.long
def test_both_sides_train_the_same_tokens() -> None:
    pythons = ["--torch-python", torch_python(), "--meshlm-python", sys.executable]
    ran = bench(*pythons, *TINY, "--steps", "3", "--warmup", "1", "--rounds", "1")
    assert ran.returncode == 0, ran.stderr

    (line,) = ran.stdout.splitlines()
    result = json.loads(line)
    torch, meshlm = result["contestants"]
    assert (torch["kind"], meshlm["kind"]) == ("torch", "meshlm")
    for side in (torch, meshlm):
        assert side["measured_steps"] == 3 - 1
        assert side["tokens_per_s"] == pytest.approx(2 * 32 / side["step_s"], rel=0.01)
        assert len(side["losses"]) == 3
        assert all(math.isfinite(loss) for loss in side["losses"])
        # Steps of AdamW on tokens with a skewed distribution: the loss moves, and not far yet.
        assert len(set(side["losses"])) == 3
    assert abs(torch["losses"][0] - meshlm["losses"][0]) < 1.0
    ratio = result["ratios_to_torch"][meshlm["name"]]
    assert ratio == pytest.approx(torch["step_s"] / meshlm["step_s"], rel=0.01)
    assert "torch" in torch["versions"]
    assert "jax" in meshlm["versions"]
    assert "step 3/3" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--torch-python", "/nowhere/python"], "/nowhere/python is no interpreter"),
        (["--warmup", "6", "--steps", "6"], "leaves no step"),
        (["--heads", "7"], "--heads must divide"),
        (["--rounds", "0"], "give 1 or more"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], said: str) -> None:
    ran = bench(*arguments)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert ran.stdout == ""


def test_a_worker_that_fails_ends_the_bench() -> None:
    broken = ["--torch-python", "/bin/false", "--meshlm-python", sys.executable]
    ran = bench(*broken, *TINY)
    assert ran.returncode == 1
    assert "ended with exit code 1" in ran.stderr
    assert ran.stdout == ""


@pytest.mark.long
def test_everyone_decodes_the_same_model() -> None:
    pythons = ["--peer-python", torch_python("ctranslate2"), "--meshlm-python", sys.executable]
    ran = bench(*pythons, "--small", "--rounds", "1", "--batch-sizes", "1", "3", script="serve")
    assert ran.returncode == 0, ran.stderr

    (line,) = ran.stdout.splitlines()
    result = json.loads(line)
    sides = {(s["kind"], s["dtype"]): s for s in result["contestants"]}
    assert len(sides) == 5
    for side in sides.values():
        assert set(side["batches"]) == {"1", "3"}
        for size, found in side["batches"].items():
            assert found["turns"] == 1
            assert len(found["first_tokens"]) == int(size)
            assert found["prefill_tokens_per_s"] == pytest.approx(
                int(size) * 16 / found["prefill_s"], rel=0.1
            )
    own, peer = sides["meshlm", "int8"], sides["ctranslate2", "int8"]
    ratio = result["ratios"][own["name"]][f"decode to {peer['name']}"]["3"]
    speeds = [side["batches"]["3"]["decode_tokens_per_s"] for side in (own, peer)]
    assert ratio == pytest.approx(speeds[0] / speeds[1], rel=0.01, abs=0.001)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer-python", "/nowhere/python"], "/nowhere/python is no interpreter"),
        (["--new-tokens", "1"], "leaves nothing to decode"),
        (["--heads", "7"], "--heads must divide"),
        (["--only", "torch:int4"], "--only torch:int4: choose of torch:bfloat16"),
    ],
)
def test_wrong_options_of_the_serving_bench_are_refused(arguments: list[str], said: str) -> None:
    ran = bench(*arguments, script="serve")
    assert ran.returncode == 2
    assert said in ran.stderr
    assert ran.stdout == ""


@pytest.fixture
def gpu_modules(monkeypatch):
    """bench/gpu.py and what its processes run, as modules."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("gpu"), importlib.import_module("gpu_jobs")


def check_gpu_result(result: dict, sides: list[str]) -> None:
    assert result["small"] is True
    assert result["device"]["platform"] == "cpu"
    assert result["failures"] == []
    assert result["parity"]["small"]["float32"]["gradients"] <= 1e-4
    assert 0 < result["parity"]["small"]["bfloat16"]["logits"] <= 5e-2
    for side in sides:
        trained = result["train"]["small"][side]
        assert trained["mfu"] is None  # no data sheet gives a CPU's peak
        rows = trained["batch_size"]
        assert trained["tokens_per_s"] == pytest.approx(rows * 32 / trained["step_s"], rel=0.01)
        assert trained["measured_steps"] == 2
        assert abs(trained["losses"][0] - math.log(512)) < 1
        for rows, found in result["decode"][side].items():
            assert found["tokens_per_s"] == pytest.approx(int(rows) / found["step_s"], rel=0.01)
            # A layer and the head; keys and values of 16 + 32 tokens a row; 2 bytes each.
            read = 2 * (12 * 128 * 128 + 128 * 512) + int(rows) * 48 * 2 * 2 * 128
            assert found["bytes_per_step"] == read


@pytest.mark.long
def test_the_gpu_bench_runs_small_shapes_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    before = sorted((ROOT / "bench/results").iterdir())
    ran = bench("--alone", "--rounds", "1", "--output", str(output), script="gpu")
    assert ran.returncode == 0, ran.stderr
    assert "nothing here is a measurement of a GPU" in ran.stderr
    (line,) = ran.stdout.splitlines()
    result = json.loads(line)
    check_gpu_result(result, ["meshlm"])
    assert json.loads(output.read_text()) == result
    assert sorted((ROOT / "bench/results").iterdir()) == before


@pytest.mark.long
def test_the_gpu_bench_beside_torch() -> None:
    ran = bench("--torch-python", torch_python(), "--rounds", "2", script="gpu")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    result["train"]["small"] = {
        side: {**found, "measured_steps": found["measured_steps"] / 2}
        for side, found in result["train"]["small"].items()
    }
    check_gpu_result(result, ["meshlm", "torch"])
    assert result["torch"]["platform"] == "cpu"


def test_what_does_not_fit_a_gpu_is_passed_over(gpu_modules) -> None:
    gpu, jobs = gpu_modules
    tried = []

    def run(candidate: dict) -> dict:
        tried.append(candidate["name"])
        if candidate["name"] == "large":
            raise MemoryError("no room\nand a long dump")
        return {"outcome": "measured" if candidate["name"] == "fits" else "by the formula"}

    job = {"candidates": [{"name": n} for n in ("large", "formula", "fits", "never")]}
    found = jobs.first_that_fits(job, run, lambda error: isinstance(error, MemoryError))
    assert tried == ["large", "formula", "fits"]
    assert (found["name"], found["outcome"]) == ("fits", "measured")
    assert [way["outcome"] for way in found["tried"]] == ["out of memory", "by the formula"]
    with pytest.raises(MemoryError):
        jobs.first_that_fits(job, run, lambda error: False)

    # 6.05e9 parameters: 97 GB with AdamW and 48 with adafactor, before any activation.
    plan = gpu.plan(gpu.parser().parse_args([]), False)
    for memory, wanted in ((80e9, {"adafactor"}), (141e9, {"adamw", "adafactor"}), (40e9, set())):
        run_of = gpu.Bench([], {"memory_bytes": memory}, {}, None)
        for kind in ("meshlm", "torch"):
            side = gpu.Side(kind, sys.executable, {})
            ways = run_of._ways(side, gpu.PRESETS["gpt-j-6b"], plan)
            assert {way["optimizer"] for way in ways} == wanted
            assert ("minimal" in {way["remat"] for way in ways}) == (
                kind == "meshlm" and bool(wanted)
            )


def test_a_gpu_that_gives_other_numbers_fails(gpu_modules) -> None:
    gpu, _ = gpu_modules
    run = gpu.Bench([], {}, {}, None)
    good = {"logits": 1e-6, "loss": 1e-7, "gradients": 1e-6}
    run._check("good", good, gpu.PARITY_LIMITS)
    assert run.failures == []
    for bad in (1e-3, float("nan")):
        run._check("bad", good | {"gradients": bad}, gpu.PARITY_LIMITS)
    assert len(run.failures) == 2
    assert "gradients differ by" in run.failures[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--torch-python", "/nowhere/python"], "/nowhere/python is no interpreter"),
        (["--warmup", "8"], "leaves no step"),
        (["--presets", "7b"], "invalid choice: '7b'"),
        (["--presets", "demo"], "longer than the context of demo"),
    ],
)
def test_wrong_options_of_the_gpu_bench_are_refused(arguments: list[str], said: str) -> None:
    ran = bench(*arguments, script="gpu")
    assert ran.returncode == 2
    assert said in ran.stderr
    assert ran.stdout == ""
