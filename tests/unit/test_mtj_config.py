"""The original's JSON config: the model it means, the run it becomes, and what is refused."""

import json
from pathlib import Path

import pytest

import original
from meshlm.cli import convert_config
from meshlm.conversion.mtj.config import (
    config_of_model,
    looks_like_old_config,
    parse_old_config,
    read_old_config,
)
from meshlm.conversion.mtj.recipe import differences, to_run_config
from meshlm.core.config import from_dict
from meshlm.core.errors import BadInputError, UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias
from meshlm.model.presets import PRESETS
from meshlm.training.config import TrainConfig

# The published config of GPT-J 6B, as it stands in the original's repository.
PUBLISHED = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 64,
    "seq": 2048,
    "cores_per_replica": 8,
    "per_replica_batch": 1,
    "gradient_accumulation_steps": 16,
    "warmup_steps": 3000,
    "anneal_steps": 300000,
    "lr": 1.2e-4,
    "end_lr": 1.2e-5,
    "weight_decay": 0.1,
    "total_steps": 350000,
    "tpu_size": 256,
    "bucket": "neo-models",
    "model_dir": "mesh_jax_pile_6B_rotary",
    "train_set": "pile.train.index",
    "val_set": {"pile": "pile.val.index", "owt": "openwebtext2_new_inputs.val.index"},
    "eval_harness_tasks": ["lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa"],
    "val_batches": 100,
    "val_every": 500,
    "ckpt_every": 500,
    "keep_every": 10000,
    "name": "GPT3_6B_pile_rotary",
    "comment": "",
}


def parse(**changes):
    settings = {key: value for key, value in (PUBLISHED | changes).items() if value is not None}
    return parse_old_config(json.dumps(settings).encode() + b"\n", "6B.json")


def test_the_published_config_is_the_preset():
    model = parse().model
    preset = PRESETS["gpt-j-6b"]
    assert model.has_bias("embedding")
    assert with_embedding_bias(model, False) == preset


def test_the_published_config_becomes_a_run():
    run = to_run_config(parse())
    assert from_dict(ModelConfig, run.pop("model"), "run") == parse().model
    assert run == {
        "recipe": "mtj-2021",
        "recipe_shards": 8,
        "steps": 350_000,
        # 1,048,576 tokens a step, as published.
        "batch_size": 512,
        "seq_len": 2048,
        "accumulate": 16,
        "learning_rate": 1.2e-4,
        "end_learning_rate": 1.2e-5,
        "warmup_steps": 3000,
        "anneal_steps": 300_000,
        "weight_decay": 0.1,
        "z_loss": 1e-4,
        "mesh": {"data": 32, "model": 8},
        "checkpoint_every": 500,
        "eval_every": 500,
        "keep_every": 10_000,
        "eval_tokens": 100 * 32 * 2048,
    }


def test_the_options_are_those_of_training():
    run = to_run_config(parse())
    own = {"model", "recipe", "recipe_shards"}
    assert run.keys() - own <= TrainConfig.__dataclass_fields__.keys()


def test_the_differences_are_those_of_the_config():
    lines = differences(parse())
    assert len(lines) == len(set(lines))
    starts = [line.split(":")[0] for line in lines]
    for key in ("total_steps", "ckpt_every", "val_every", "keep_every", "train_set", "bucket"):
        assert starts.count(key) == 1, key
    assert "early_cast" not in starts
    assert "300000" in lines[0]
    assert "303000" in lines[0]
    assert "early_cast" in [line.split(":")[0] for line in differences(parse(early_cast=False))]
    fewer = [line.split(":")[0] for line in differences(parse(keep_every=None, tpu_size=None))]
    assert "keep_every" not in fewer
    assert "tpu_size" in fewer
    short = [line for line in differences(parse(total_steps=1000)) if "total_steps" in line]
    assert any("ends at step 1000, before the anneal does at 303000" in line for line in short)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n_head": 16}, "unknown key 'n_head'; did you mean 'n_heads'"),
        ({"quantum": 1}, "unknown key 'quantum'; it could change the numbers"),
        ({"norm": "layernorm-desync"}, "norm is 'layernorm-desync'"),
        ({"norm": "rmsnorm"}, "norm is 'rmsnorm'"),
        ({"norm": None}, "norm is None"),
        ({"pe": "t5"}, "pe is 't5'"),
        ({"pe": "fixed"}, "pe is 'fixed'"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 28.0}, "layers is 28.0"),
        ({"layers": True}, "layers is True"),
        ({"layers": 10**12}, "layers is 1000000000000"),
        ({"seq": None}, "no 'seq'"),
        ({"pe_rotary_dims": None}, "no 'pe_rotary_dims'"),
        ({"pe_rotary_dims": 63}, "rotary_dim is 63"),
        ({"pe_rotary_dims": 300}, "rotary_dim is 300"),
        ({"n_heads": 15}, "4096 cannot be cut into 15 heads"),
        ({"lr": -1}, "lr is -1"),
        ({"lr": "1e-4"}, "lr is '1e-4'"),
    ],
)
def test_what_gives_other_numbers_is_refused(changes, why):
    with pytest.raises(BadInputError, match=why) as caught:
        parse(**changes)
    assert str(caught.value).startswith("6B.json")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lr": None}, "no 'lr'"),
        ({"cores_per_replica": None}, "no 'cores_per_replica'"),
        ({"tpu_size": 12}, "tpu_size 12 cannot be shared by replicas of 8"),
        ({"cores_per_replica": 32}, "cannot be cut into cores_per_replica 32"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused(changes, why):
    with pytest.raises(BadInputError, match=why):
        to_run_config(parse(**changes))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"layers": 1}' + b" " * (2 << 20)]
)
def test_what_is_no_config_is_refused(data):
    assert not looks_like_old_config(data)
    with pytest.raises(BadInputError, match=r"x\.json"):
        parse_old_config(data, "x.json")


def test_a_key_twice_is_refused():
    with pytest.raises(BadInputError, match="key 'layers' twice"):
        parse_old_config(b'{"layers": 1, "layers": 2}', "x.json")


def test_what_a_model_is_written_as_reads_back():
    model = original.small()
    data = json.dumps(config_of_model(model, 2)).encode()
    assert parse_old_config(data, "x").model == model


def test_the_command_writes_and_tells(tmp_path: Path, capsys):
    path = tmp_path / "6B.json"
    path.write_text(json.dumps(PUBLISHED))
    convert_config.run(convert_config.Config(file=path))
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(to_run_config(read_old_config(path))))
    assert "\n- ckpt_every:" in printed.err
    out = tmp_path / "run.json"
    convert_config.run(convert_config.Config(file=path, out=out))
    assert out.read_text() == printed.out
    assert "\n- ckpt_every:" in capsys.readouterr().out
    with pytest.raises(UsageError, match="there already"):
        convert_config.run(convert_config.Config(file=path, out=out))
    with pytest.raises(UsageError, match="folder is not there"):
        convert_config.run(convert_config.Config(file=path, out=tmp_path / "no" / "run.json"))
    with pytest.raises(UsageError, match="no such file"):
        convert_config.run(convert_config.Config(file=tmp_path / "no.json"))
