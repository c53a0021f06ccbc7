"""The benches: all sides compute a tiny shape and the line of JSON adds up."""

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
