"""Recorded outputs of the original mesh-transformer-jax, from small checkpoints that it wrote.

The recordings are in tests/fixtures/mtj: the layout of the released files (folders of 16 npz files
a shard, leaves without names) with 8 shards in bfloat16, 4 shards whose summed biases differ, and
12 layers with Adam's state. Everything goes in by `meshlm.load` and the command's own readers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshlm
from meshlm.conversion.convert import convert
from meshlm.conversion.opening import open_source
from meshlm.model.params import count_params
from meshlm.ops.loss import token_loss
from meshlm.step import StepBatch, batch_loss
from tiny import relative_max, step_config

pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "fixtures" / "mtj"
NAMES = ("dev_s8_bf16", "dev_s4_distinct", "dev_train_s2")


def golden_of(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    return golden_of(name)


@pytest.fixture(scope="module")
def model(name) -> meshlm.Model:
    return meshlm.load(FOLDER / name / "slim", dtype="float32")


def tokens_of(golden, key: str) -> np.ndarray:
    return golden[key][None].astype(np.int32)


def test_the_checkpoint_has_all_parameters(model):
    sizes = [leaf.size for leaf in jax.tree.leaves(model.params)]
    assert sum(sizes) == count_params(model.config)
    assert model.config.has_bias("embedding")


def test_logits(model, golden):
    found = model.logits(tokens_of(golden, "tokens"))[0]
    assert relative_max(found, golden["logits"]) <= 2e-5


@pytest.mark.parametrize("profile", ["hf", "mtj-2021"])
def test_logits_in_other_profiles(profile):
    golden = golden_of("dev_s4_distinct")
    model = meshlm.load(FOLDER / "dev_s4_distinct" / "slim", dtype="float32", profile=profile)
    found = model.logits(tokens_of(golden, "tokens"))[0]
    assert relative_max(found, golden["logits"]) <= 2e-5


def test_mtj_2021_needs_no_float32_for_weights_stored_in_bfloat16():
    """Its products are float32, and the weights are as they were trained."""
    golden = golden_of("dev_s8_bf16")
    folder = FOLDER / "dev_s8_bf16" / "slim"
    exact, rough = (meshlm.load(folder, profile=profile) for profile in ("mtj-2021", "fast"))
    tokens = tokens_of(golden, "tokens")
    assert relative_max(exact.logits(tokens)[0], golden["logits"]) <= 2e-5
    assert relative_max(rough.logits(tokens)[0], golden["logits"]) > 1e-3


def test_the_loss_of_every_token(golden):
    found = token_loss(jnp.asarray(golden["logits"][None]), tokens_of(golden, "targets"))
    np.testing.assert_allclose(found.nll_BT[0], golden["all_loss"], rtol=1e-5)


@pytest.mark.parametrize(("z_loss", "recorded"), [(0.0, "loss"), (1e-4, "loss_z")])
def test_the_loss(model, golden, z_loss, recorded):
    tokens, targets = (jnp.asarray(tokens_of(golden, key)) for key in ("tokens", "targets"))
    batch = StepBatch(
        tokens=tokens, targets=targets, loss_mask=jnp.ones(tokens.shape), segment_ids=None
    )
    step = step_config(model.config, z_loss=z_loss)
    total, count = jax.jit(lambda p, b: batch_loss(p, b, step))(stacked(model.params), batch)
    assert float(total / count) == pytest.approx(float(golden[recorded]), rel=2e-6)


def stacked(params):
    blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *params.blocks)
    return params.__class__(**{**vars(params), "blocks": blocks})


def test_the_z_loss_tells(golden):
    # The two recordings differ by enough for the test above to tell them apart.
    assert abs(golden["loss_z"] / golden["loss"] - 1) > 5e-6


def test_greedy_decoding_with_a_cache(model, golden):
    """The original decodes right-aligned in its window; rotary attention sees distances alone."""
    prompt = golden["prompt"].tolist()
    sample = model.generate([prompt], max_tokens=len(golden["greedy"]), temperature=0)
    assert sample.tokens == golden["greedy"].tolist()
    whole = np.array([prompt + sample.tokens], np.int32)
    logits = model.logits(whole)[0, len(prompt) - 1 : -1]
    for found, recorded in zip(logits, golden["greedy_logits"], strict=True):
        assert relative_max(found, recorded) <= 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_byte_for_byte(name, tmp_path):
    """mtj -> meshlm -> mtj: every array of every shard, its type and its shape."""
    original = FOLDER / name / "slim" / "step_383500"
    shutil.copytree(FOLDER / name, tmp_path / "original")
    shards = len(list(original.iterdir()))
    there_and_back(tmp_path, tmp_path / "original" / "slim", shards)
    assert_same_arrays(original, tmp_path / "back" / "step_383500")


def test_a_full_checkpoint_there_and_back(tmp_path):
    shutil.copytree(FOLDER / "dev_train_s2", tmp_path / "original")
    there_and_back(tmp_path, tmp_path / "original" / "full", 2)
    assert_same_arrays(FOLDER / "dev_train_s2" / "full" / "step_10", tmp_path / "back" / "step_10")


def there_and_back(folder: Path, source: Path, shards: int) -> None:
    convert(open_source(source), folder / "native", to="meshlm")
    convert(open_source(folder / "native"), folder / "back", to="mtj", shards=shards)


def assert_same_arrays(one: Path, other: Path) -> None:
    paths = sorted(path.relative_to(one) for path in one.rglob("*.npz"))
    assert paths == sorted(path.relative_to(other) for path in other.rglob("*.npz"))
    for path in paths:
        with np.load(one / path) as here, np.load(other / path) as there:
            assert here.files == there.files
            for key in here.files:
                a, b = here[key], there[key]
                assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


@pytest.mark.long
def test_the_recorded_run_is_carried_on():
    """From step 0, without and with the original's casts, and from its own step 10."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "replay_mtj.py", FOLDER / "dev_train_s2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["good"] is True
    assert result["deviations"].keys() > result["limits"].keys()
    # Beyond that: the norm as it is reported, and going on from a state that it had saved.
    assert result["deviations"]["grad_norm_mtj_exact"] <= 3e-2
    assert result["from_later"]["step_10"]["train_loss_mtj"] <= 1e-3
