"""Weights through the commands: out of a run, into other formats, and into runs again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import meshlm as package
from meshlm.cli.main import main
from runs import SMALL, arrays, one_line, repeatable

pytestmark = pytest.mark.timeout(600)
RECIPE = ("--recipe", "mtj-2021", "--warmup-steps", "2", "--anneal-steps", "20", "--keep", "9")


@pytest.fixture(scope="module")
def original(tmp_path_factory, store, shared_compilation):
    """A run by the original's recipe, of 4 steps and then of 8, and its step 4 as it saved it."""
    folder = tmp_path_factory.mktemp("original")
    run, shards = folder / "run", ("--recipe-shards", "4")
    options = (*SMALL, "--data", str(store), "--run", str(run), *RECIPE, *shards)
    assert main(["train", *options, "--steps", "4"]) == 0
    assert main(["convert", str(run), str(folder / "full"), "--to", "mtj", "--shards", "4"]) == 0
    assert main(["train", *options, "--steps", "8"]) == 0
    return folder


def train(meshlm, run, store, *words):
    return meshlm("train", *SMALL, "--data", store, "--run", run, *words)


def test_a_run_goes_on_from_the_originals_files_as_if_it_had_never_stopped(
    meshlm, original, store, tmp_path
):
    run = tmp_path / "run"
    words = ("--resume-from", original / "full", *RECIPE, "--steps", "8")
    code, out, err = train(meshlm, run, store, *words)
    assert code == 0, err
    assert "going on from step 4" in out.replace("\n", " ")
    straight = [line for line in repeatable(original / "run") if line["step"] > 4]
    here = repeatable(run)
    # The noise scale's averages are not in the original's files.
    for line in straight + here:
        del line["grad_noise_scale"]
    assert here == straight
    wanted = arrays(original / "run" / "checkpoints" / "step_8")
    found = arrays(run / "checkpoints" / "step_8")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("to", ["mtj", "hf", "meshlm"])
def test_a_run_begins_with_weights_of_any_format(meshlm, run_of_10, store, tmp_path, to):
    assert meshlm("convert", run_of_10, tmp_path / to, "--to", to)[0] == 0
    still = ("--learning-rate", "0", "--end-learning-rate", "0", "--steps", "1")
    code, out, err = train(meshlm, tmp_path / "run", store, "--init", tmp_path / to, *still)
    assert code == 0, err
    assert "optimizer begins anew" in out.replace("\n", " ")
    wanted = arrays(run_of_10 / "checkpoints" / "step_10")
    found = arrays(tmp_path / "run" / "checkpoints" / "step_1")
    params = {name for name in wanted if name.startswith("params.")}
    extra = found.keys() - wanted.keys()
    assert extra == ({f"{room}.embedding.bias" for room in ROOMS} if to == "mtj" else set())
    for name in params:
        assert found[name].tobytes() == wanted[name].tobytes(), name
    assert int(found["optimizer.adam.count"]) == 1


def test_the_recipe_adds_an_embedding_bias_of_zeros(meshlm, run_of_10, store, tmp_path):
    assert meshlm("convert", run_of_10, tmp_path / "hf", "--to", "hf")[0] == 0
    still = ("--learning-rate", "0", "--end-learning-rate", "0", "--steps", "1")
    words = ("--init", tmp_path / "hf", *RECIPE[:2], *still)
    assert train(meshlm, tmp_path / "run", store, *words)[0] == 0
    found = arrays(tmp_path / "run" / "checkpoints" / "step_1")
    assert not found["params.embedding.bias"].any()
    assert found["optimizer.adam.mu.embedding.bias"].any()


ROOMS = ("params", "optimizer.adam.mu", "optimizer.adam.nu")


def test_what_cannot_go_on_is_refused(meshlm, original, run_of_10, store, tmp_path):
    assert meshlm("convert", run_of_10, tmp_path / "hf", "--to", "hf")[0] == 0
    both = ("--init", tmp_path / "hf", "--resume-from", original / "full")
    cases = {
        ("--resume-from", tmp_path / "hf", "--steps", "20"): "no moments of Adam",
        ("--resume-from", original / "full", "--steps", "4"): "is at step 4 already",
        (*both, "--steps", "20"): "give one",
        ("--init", tmp_path / "hf", "--preset", "demo"): "--preset demo",
        ("--init", tmp_path / "hf", "--vocab-size", "640"): "--vocab-size 640",
        ("--init", tmp_path / "nowhere"): "nowhere",
        ("--recipe-shards", "4"): "--recipe-shards",
    }
    small = [word for word in SMALL if word not in ("--preset", "test")]
    for words, said in cases.items():
        code, _, err = meshlm("train", *small, "--data", store, "--run", tmp_path / "r", *words)
        assert code == 2, (words, err)
        assert said in one_line(err)
        assert not (tmp_path / "r").exists()


def test_data_of_another_tokenizer_is_refused(meshlm, run_of_10, text, tmp_path):
    other = tmp_path / "store"
    assert meshlm("data", "prepare", text, "--out", other, "--tokenizer", "train:500")[0] == 0
    code, _, err = train(meshlm, tmp_path / "run", other, "--init", run_of_10)
    assert code == 2
    assert "prepare it again with the tokenizer of the weights" in one_line(err)


def test_a_run_that_goes_on_keeps_its_origin(meshlm, run_of_10, store, tmp_path):
    run = tmp_path / "run"
    assert train(meshlm, run, store, "--init", run_of_10, "--steps", "1")[0] == 0
    assert train(meshlm, run, store, "--steps", "2")[0] == 0
    code, _, err = train(meshlm, run, store, "--init", tmp_path, "--steps", "3")
    assert code == 2
    assert "--init was" in one_line(err)


def test_options_from_a_file(meshlm, original, store, tmp_path):
    old = json.loads((original / "full" / "config.json").read_text())
    recipe = {"per_replica_batch": 2, "gradient_accumulation_steps": 2, "tpu_size": 8}
    rates = {"warmup_steps": 2, "anneal_steps": 20, "lr": 1e-3, "end_lr": 1e-4}
    rest = {"weight_decay": 0.1, "total_steps": 22}
    (tmp_path / "old.json").write_text(json.dumps(old | recipe | rates | rest))
    code, out, err = meshlm("convert-config", tmp_path / "old.json", "--out", tmp_path / "new.json")
    assert code == 0, err
    assert "anneal" in out + err
    words = ("--config", tmp_path / "new.json", "--data", store, "--run", tmp_path / "run")
    one = ("--mesh.data", "1", "--mesh.model", "1")
    code, out, err = meshlm("train", *words, *one, "--steps", "2", "--sample-every", "0")
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert record["recipe"] == "mtj-2021"
    assert record["optimizer"]["bias_shares"] == 4
    assert record["optimizer"]["learning_rate"] == 1e-3
    assert (record["batch_size"], record["accumulate"], record["steps"]) == (8, 2, 2)
    (tmp_path / "new.json").write_text('{"learning_rte": 1}')
    code, _, err = meshlm("train", *words, "--sample-every", "0")
    assert code == 3
    assert "learning_rate" in one_line(err)


def test_text_is_the_same_in_every_format(meshlm, run_of_10, tmp_path):
    assert meshlm("convert", run_of_10, tmp_path / "hf", "--to", "hf")[0] == 0
    words = ("--prompt", "def f(", "--max-tokens", "6", "--seed", "3", "--json")
    samples = []
    for path in (run_of_10, tmp_path / "hf"):
        code, out, err = meshlm("generate", path, *words)
        assert code == 0, err
        samples.append(json.loads(out)["samples"])
    assert samples[0] == samples[1]


def test_a_model_without_a_tokenizer(meshlm, original, tmp_path):
    folder = shutil.copytree(original / "full", tmp_path / "full")
    assert meshlm("generate", folder, "--prompt", "x", "--max-tokens", "1")[0] == 0
    for name in ("tokenizer.json", "special_tokens.json"):
        (folder / name).unlink()
    code, _, err = meshlm("generate", folder, "--prompt", "x")
    assert code == 2
    assert "no tokenizer" in one_line(err)
    model = package.load(folder)
    sample = model.generate([[1, 2, 3]], max_tokens=4)
    assert len(sample.tokens) == 4
    assert sample.text == ""
    with pytest.raises(package.core.errors.UsageError, match="no tokenizer"):
        model.score("text")


def test_compare(meshlm, run_of_10, original, tmp_path):
    assert meshlm("convert", run_of_10, tmp_path / "hf", "--to", "hf")[0] == 0
    code, out, err = meshlm("compare", run_of_10, tmp_path / "hf", "--json")
    assert code == 0, err
    same = json.loads(out)
    assert same["max_difference"] == same["kl"] == 0
    assert same["top1_agreement"] == 1
    words = ("--dtype", "bfloat16", "--other-profile", "hf", "--length", "40", "--json")
    code, out, err = meshlm("compare", run_of_10, *words)
    apart = json.loads(out)
    assert apart["tokens"] == 40
    one, other = (
        package.load(run_of_10, dtype="bfloat16", profile=profile) for profile in ("fast", "hf")
    )
    tokens = [one.tokenizer.encode(package.comparison.SAMPLE_TEXT)[:40]]
    difference = np.abs(one.logits(tokens) - other.logits(tokens)).max()
    assert apart["max_difference"] == pytest.approx(float(difference), rel=1e-5)
    assert 0 < apart["kl"] < 0.01
    shutil.copytree(tmp_path / "hf", tmp_path / "damaged")
    weights = (tmp_path / "damaged" / "model.safetensors").read_bytes()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(weights[:-1])
    code, _, err = meshlm("compare", run_of_10, tmp_path / "damaged")
    assert code == 3
    assert "model.safetensors" in one_line(err)
