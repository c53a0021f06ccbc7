"""Options of a run: what is refused, what follows from what, and what may not change."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from meshlm.core.config import from_dict, to_dict, to_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.model.presets import PRESETS
from meshlm.planning.memory import least_memory
from meshlm.training import loop, start
from meshlm.training.config import (
    _NUMBERS,
    _WHOLE_NUMBERS,
    Origin,
    RunConfig,
    StoreRecord,
    TrainConfig,
    check_batch,
)
from meshlm.training.continuing import continued_run, first_difference
from meshlm.training.memory import check_memory, setup_of_run
from meshlm.training.metrics import NoiseScale
from meshlm.training.new_run import new_run
from meshlm.training.run_folder import parse_config
from meshlm.training.saved import saved_files, saved_noise

STORE = StoreRecord(path="/data/store", weight=1.0, fingerprint="f" * 64)
OTHER = dataclasses.replace(STORE, fingerprint="0" * 64)


def options(**given) -> TrainConfig:
    return TrainConfig(run=Path("run"), **given)


def begun(*, origin: Origin | None = None, **given) -> RunConfig:
    return new_run(options(**given), (STORE,), "t" * 64, 512, origin=origin)


@pytest.mark.parametrize("name", _WHOLE_NUMBERS)
def test_whole_numbers_have_bounds(name):
    least, most = _WHOLE_NUMBERS[name]
    options(**{name: least})
    options(**{name: most})
    flag = name.replace("_", "-")
    for wrong in (least - 1, most + 1, -(10**30)):
        with pytest.raises(UsageError, match=f"--{flag} {wrong}: give"):
            options(**{name: wrong})


@pytest.mark.parametrize("name", _NUMBERS)
@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_numbers_are_finite_and_not_below_zero(name, wrong):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
        options(**{name: wrong})


def test_every_number_is_checked():
    kinds = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    whole = {name for name, kind in kinds.items() if "int" in re.findall(r"\w+", kind)}
    numbers = {name for name, kind in kinds.items() if "float" in re.findall(r"\w+", kind)}
    assert whole == set(_WHOLE_NUMBERS)
    assert numbers == set(_NUMBERS)


def test_what_follows_from_the_others():
    record = begun(preset="test", steps=400)
    assert record.model == dataclasses.replace(PRESETS["test"], vocab_size=512)
    assert record.seq_len == 128
    assert record.optimizer.warmup_steps == 20
    assert record.optimizer.anneal_steps == 380
    assert record.optimizer.end_learning_rate == record.optimizer.learning_rate / 10
    # GPT-3's and GPT-J's peak rates, from their papers.
    assert begun(preset="125m").optimizer.learning_rate == 6e-4
    assert begun(preset="1.3b").optimizer.learning_rate == 2e-4
    assert begun(preset="gpt-j-6b").optimizer.learning_rate == 1.2e-4
    assert begun(preset="gpt-j-6b", steps=350_000).optimizer.warmup_steps == 3000


def test_a_run_goes_on_with_what_it_has():
    record = begun(preset="test", steps=100)
    assert continued_run(options(), record, (STORE,)) == record
    more = continued_run(options(steps=200), record, (STORE,))
    assert more == dataclasses.replace(record, steps=200)
    moved = dataclasses.replace(STORE, path="/elsewhere")
    assert continued_run(options(), record, (moved,)).data == (moved,)
    with pytest.raises(UsageError, match=r"--data was .*ffff.* and is .*0000"):
        continued_run(options(), record, (OTHER,))


def test_the_optimizer_of_a_run():
    assert begun(preset="test").optimizer.name == "adamw"
    record = begun(preset="test", optimizer="adafactor")
    assert record.optimizer.name == "adafactor"
    assert continued_run(options(), record, (STORE,)) == record
    with pytest.raises(UsageError, match="--optimizer was adafactor in the run run and is adamw"):
        continued_run(options(optimizer="adamw"), record, (STORE,))
    # Adam's moments, or the original's way of training, leave no choice.
    original = Origin(path="/weights", format="mtj", step=7, goes_on=True, shards=8)
    with pytest.raises(UsageError, match="--resume-from needs adamw"):
        begun(preset="test", optimizer="adafactor", origin=original)
    begun(preset="test", optimizer="adafactor", origin=dataclasses.replace(original, goes_on=False))
    with pytest.raises(UsageError, match="--recipe mtj-2021 needs adamw"):
        begun(preset="test", optimizer="adafactor", recipe="mtj-2021")


def test_a_run_from_before_there_was_a_choice_of_optimizers():
    record = begun(preset="test", steps=100)
    content = json.loads(to_json({"run": to_dict(record)}))
    del content["run"]["optimizer"]["name"]
    assert parse_config(json.dumps(content).encode(), "there") == record


def test_the_first_difference():
    record = begun(preset="test", steps=100)
    same = dataclasses.replace(
        record, steps=7, data=(dataclasses.replace(STORE, path="/elsewhere"),)
    )
    assert first_difference(record, same) is None
    optimizer = dataclasses.replace(record.optimizer, weight_decay=0.5)
    other = dataclasses.replace(record, optimizer=optimizer)
    assert first_difference(record, other) == "optimizer.weight_decay is 0.1 and 0.5"
    data = dataclasses.replace(record, data=(OTHER,))
    assert "data is" in str(first_difference(record, data))


def test_records_survive_json():
    record = begun(preset="test", steps=100, learning_rate=1 / 3)
    content = json.loads(to_json({"run": to_dict(record)}))
    assert parse_config(json.dumps(content).encode(), "there") == record
    content["run"]["model"]["d_modle"] = 3
    with pytest.raises(BadInputError, match="did you mean 'd_model'"):
        parse_config(json.dumps(content).encode(), "there")
    del content["run"]["model"]["d_modle"]
    content["run"]["steps"] = "many"
    with pytest.raises(BadInputError, match="there"):
        parse_config(json.dumps(content).encode(), "there")
    content["run"] |= {"steps": 100, "model": content["run"]["model"] | {"tied_head": True}}
    with pytest.raises(BadInputError, match=r"there \(run\): tied_head is True: GPT-J has False"):
        parse_config(json.dumps(content).encode(), "there")
    for wrong in (b"", b"[]", b"{}", b"\xff", b"null"):
        with pytest.raises(BadInputError, match="there"):
            parse_config(wrong, "there")


def test_from_dict_is_strict():
    with pytest.raises(BadInputError, match="unknown setting 'moddel'; did you mean 'model'"):
        from_dict(MeshConfig, {"moddel": 2}, "mesh")
    with pytest.raises(BadInputError, match="not an object"):
        from_dict(MeshConfig, [1], "mesh")
    assert from_dict(MeshConfig, {"model": 2}, "mesh") == MeshConfig(model=2)


def test_batch_and_mesh():
    record = begun(preset="test", batch_size=12, accumulate=2)
    check_batch(record, MeshConfig(data=2))
    with pytest.raises(UsageError, match="give a multiple of 8"):
        check_batch(record, MeshConfig(replica=2, data=2))


def test_memory():
    record = begun(preset="gpt-j-6b", vocab_size=50_400, batch_size=4, seq_len=2048)
    setup = setup_of_run(record, MeshConfig(replica=2), None)
    assert (setup.step, setup.batch_size) == (record.step_config(None, MeshConfig()), 4)
    state, activations = least_memory(setup)
    # Four float32 numbers a parameter and the batch; a float32 a residual of each of 28 layers and
    # the logits of a chunk, of the two rows of a device.
    assert state == 16 * 6_050_882_784 + 2 * 3 * 4 * 2048
    assert activations == 4 * (2 * 2048 * 28 * 4096 + 512 * 50_400)
    # Adafactor has no moments as large as the weights: rows and columns of them.
    lean = begun(preset="gpt-j-6b", vocab_size=50_400, optimizer="adafactor")
    lean_state = least_memory(setup_of_run(lean, MeshConfig(), None))[0]
    assert 8 * 6_050_882_784 < lean_state < 8.02 * 6_050_882_784
    check_memory(begun(preset="test"), MeshConfig())
    for huge in ({"preset": "23b"}, {"preset": "test", "batch_size": 2**31 - 1}):
        with pytest.raises(UsageError, match="GB of memory a device"):
            check_memory(begun(**huge), MeshConfig())


def test_the_memory_of_hosts_that_are_not_known_refuses_nothing(monkeypatch):
    huge = begun(preset="23b")
    monkeypatch.setattr("meshlm.training.memory.count", lambda: 2)
    check_memory(huge, MeshConfig())


@pytest.mark.parametrize("first", ["plain", "splash"])
def test_all_processes_take_one_attention(monkeypatch, first):
    monkeypatch.setattr(start, "share", lambda _: first)
    config, mesh = options(), make_mesh(MeshConfig())
    record = begun(preset="test")
    if first == "plain":
        assert start.pick_attention(config, record, mesh) == "plain"
        return
    with pytest.raises(UsageError, match="attention is splash by process 0's devices and plain by"):
        start.pick_attention(config, record, mesh)


def test_checkpoint_files_carry_the_noise_scale():
    noise = NoiseScale(gradient_squared=1 / 3, noise=2 / 7)
    files = saved_files({"config.json": b"{}"}, 5, begun(preset="test"), noise)
    assert json.loads(files["position.json"])["tokens"] == 5 * 8 * 128
    assert saved_noise(files, "there") == noise
    with pytest.raises(BadInputError, match=r"no position\.json"):
        saved_noise({}, "there")


def test_looking_for_disk_is_quick_however_long_the_run(tmp_path, monkeypatch):
    # 2^31 checkpoints to come: only the next ones are looked at.
    run = object.__new__(loop._Run)
    run.config = options(checkpoint_every=1, keep_every=2)
    run.record = begun(preset="test", steps=2**31 - 1)
    run.abstract, run.checkpoints = {}, tmp_path
    monkeypatch.setattr(loop, "to_named", lambda tree: tree)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(UsageError, match="too little disk"):
        run._check_disk(0)
