"""Runs and checkpoints of format 1, written by the code before format 2: they load and resume.

tests/fixtures/format_1/README.md says what each of them is and what was recorded of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore

import meshlm as package
from meshlm import checkpoint
from runs import arrays, assert_same_run, repeatable
from servers import Server

pytestmark = pytest.mark.timeout(600)
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"
RECORDED: dict[str, Any] = json.loads((FIXTURES / "recorded.json").read_text())
SOURCES = ("adamw", "adafactor", "converted")
TOKENS = np.arange(12)[None] * 7 % 264
OPTIONS = (
    *("--batch-size", "4", "--seq-len", "16", "--sample-every", "0", "--eval-every", "4"),
    *("--eval-tokens", "256", "--compute-dtype", "float32", "--learning-rate", "3e-3"),
    *("--end-learning-rate", "3e-4", "--warmup-steps", "1", "--anneal-steps", "9"),
    *("--checkpoint-every", "4"),
)
# Written out here, because what reads format 1 has a table of its own.
RENAMED = {
    "blocks.norm_scale": "blocks.attention_norm.scale",
    "blocks.norm_offset": "blocks.attention_norm.offset",
    "blocks.query": "blocks.attention.query.weight",
    "blocks.key": "blocks.attention.key.weight",
    "blocks.value": "blocks.attention.value.weight",
    "blocks.attention_out": "blocks.attention.out.weight",
    "blocks.ff_in": "blocks.feed_forward.up.weight",
    "blocks.ff_in_bias": "blocks.feed_forward.up.bias",
    "blocks.ff_out": "blocks.feed_forward.down.weight",
    "blocks.ff_out_bias": "blocks.feed_forward.down.bias",
    "embedding": "embedding.tokens",
    "embedding_bias": "embedding.bias",
    "final_norm_scale": "final_norm.scale",
    "final_norm_offset": "final_norm.offset",
    "head": "head.weight",
    "head_bias": "head.bias",
}
PREFIX = re.compile(
    r"(params|optimizer\.adam\.(mu|nu)|optimizer\.adafactor\.(v_row|v_col|v))\.(.*)"
)


def renamed(name: str) -> str:
    """The name in format 2 of an array of format 1."""
    found = PREFIX.fullmatch(name)
    return name if found is None else f"{found[1]}.{RENAMED[found[4]]}"


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory) -> Path:
    """The unpacked folders. Copy what you change."""
    folder = tmp_path_factory.mktemp("format_1")
    for archive in FIXTURES.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def step_folder(fixtures: Path, source: str) -> Path:
    folder = fixtures / source
    return folder if source == "converted" else folder / "checkpoints" / "step_4"


def resume(meshlm, fixtures: Path, source: str, run: Path, *, steps: int) -> None:
    """Continues a copy of the run, or begins a run from the converted checkpoint."""
    words = ["train", *OPTIONS, "--data", fixtures / "store", "--run", run, "--steps", str(steps)]
    if source == "adafactor":
        words += ["--optimizer", "adafactor"]
    if source == "converted" and not run.exists():
        words += ["--resume-from", fixtures / source]
    if source != "converted" and not run.exists():
        shutil.copytree(fixtures / source, run)
    code, _, err = meshlm(*words)
    assert code == 0, err


def assert_as_recorded(source: str, run: Path) -> None:
    """Lines after step 4 and the arrays of step 8: to 1e-6 of what was recorded elsewhere."""
    recorded = RECORDED[source]
    found = [line for line in repeatable(run) if line["step"] > 4]
    assert len(found) == len(recorded["metrics"]) == 4
    for line, wanted in zip(found, recorded["metrics"], strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            assert line[name] == (value and pytest.approx(value, rel=1e-6)), name
    state = arrays(run / "checkpoints" / "step_8")
    assert state.keys() == {renamed(name) for name in recorded["arrays"]}
    for name, wanted in recorded["arrays"].items():
        array = state[renamed(name)].astype(np.float64)
        assert list(array.shape) == wanted["shape"], name
        close = {"rel": 1e-4, "abs": 1e-9}
        assert np.linalg.norm(array) == pytest.approx(wanted["norm"], rel=1e-5, abs=1e-12), name
        assert array.ravel()[:3].tolist() == pytest.approx(wanted["first"], **close), name


@pytest.mark.parametrize("source", SOURCES)
def test_it_resumes_to_the_recorded_losses(meshlm, fixtures, tmp_path, source):
    """Also bit for bit when it was saved again, in the newest format, on the way."""
    resume(meshlm, fixtures, source, tmp_path / "straight", steps=8)
    assert_as_recorded(source, tmp_path / "straight")
    resume(meshlm, fixtures, source, tmp_path / "saved", steps=6)
    manifest = checkpoint.read_manifest(tmp_path / "saved" / "checkpoints" / "step_6")
    assert manifest.arrays.keys() == {renamed(name) for name in RECORDED[source]["arrays"]}
    resume(meshlm, fixtures, source, tmp_path / "saved", steps=8)
    drop_measurements(tmp_path / "straight", tmp_path / "saved")
    assert_same_run(tmp_path / "saved", tmp_path / "straight", 8)


def drop_measurements(*runs: Path) -> None:
    """Removes the held-out losses of the last step before the end of one of the runs."""
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [
            {k: v for k, v in line.items() if line["step"] != 6 or not k.startswith("val_")}
            for line in lines
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


@pytest.mark.parametrize("source", SOURCES)
def test_every_array_is_read_as_it_was_written(fixtures, source):
    """Against tensorstore alone, which knows no names but those in the files."""
    step = step_folder(fixtures, source)
    written = json.loads((step / "manifest.json").read_bytes())["arrays"]
    state = arrays(step)
    assert state.keys() == {renamed(name) for name in written}
    for name in written:
        kvstore = {"driver": "ocdbt", "base": f"file://{step}/arrays/state", "path": f"{name}/"}
        store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        wanted = np.asarray(store.read().result())
        found = state[renamed(name)]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        assert found.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("source", SOURCES)
def test_it_generates_as_recorded(fixtures, source):
    recorded = RECORDED[source]
    model = package.load(fixtures / source, verify=source == "converted")
    assert ("embedding" in model.config.biases) == (source != "adamw")
    logits = model.logits(TOKENS)[0, -1, :8]
    assert logits.tolist() == pytest.approx(recorded["logits"], rel=1e-5, abs=1e-6)
    options = {"max_tokens": 8, "ignore_end_of_text": True}
    prompt = TOKENS[0, :5].tolist()
    assert model.generate([prompt], temperature=0, **options).tokens == recorded["greedy"]
    assert model.generate([prompt], seed=5, **options).tokens == recorded["seeded"]


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_verified(meshlm, fixtures, tmp_path, source):
    assert checkpoint.verify(step_folder(fixtures, source)) == []
    code, _, err = meshlm("verify", fixtures / source)
    assert code == 0, err
    damaged = shutil.copytree(step_folder(fixtures, source), tmp_path / "damaged")
    (damaged / "config.json").write_bytes((damaged / "config.json").read_bytes() + b" ")
    assert [damage.file for damage in checkpoint.verify(damaged)] == ["config.json"]


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_converted_to_the_same_bytes(meshlm, fixtures, tmp_path, source):
    code, _, err = meshlm("convert", fixtures / source, tmp_path / "hf", "--to", "hf")
    assert code == 0, err
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == RECORDED[source]["hf"]


def test_every_shard_of_the_original_comes_back(meshlm, fixtures, tmp_path):
    """Its summed biases and norms differ from shard to shard: the sidecar has them."""
    source = fixtures / "converted"
    code, _, err = meshlm("convert", source, tmp_path / "native", "--to", "meshlm")
    assert code == 0, err
    for name, path in {"one": source, "two": tmp_path / "native"}.items():
        words = ("convert", path, tmp_path / name, "--to", "mtj", "--shards", "2")
        code, _, err = meshlm(*words)
        assert code == 0, err
        for shard, recorded in RECORDED["converted"]["mtj"].items():
            digest = hashlib.sha256()
            for number in range(16):
                with np.load(tmp_path / name / "step_4" / shard / f"{number}.npz") as file:
                    for key in file.files:
                        digest.update(file[key].tobytes())
            assert digest.hexdigest() == recorded, (name, shard)


def test_it_is_served(fixtures, compiled):
    options = ("--slots", "2", "--prefill-chunk", "16")
    body = {"prompt": TOKENS[0, :5].tolist(), "max_tokens": 8, "temperature": 0, "logprobs": 1}
    with Server(fixtures / "adafactor", *options, environment=compiled) as server:
        server.wait_ready()
        (choice,) = server.complete(model="adafactor", **body).json()["choices"]
    model = package.load(fixtures / "adafactor")
    sample = model.generate([body["prompt"]], max_tokens=8, temperature=0)
    assert choice["text"] == sample.text
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(sample.logprobs, abs=1e-5)
