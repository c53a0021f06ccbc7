"""MeshLM's checkpoints as sources and targets of conversions."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from meshlm import checkpoint
from meshlm.checkpoint import Checkpointer, restoring
from meshlm.conversion.native import source as native
from meshlm.conversion.native.source import find_checkpoint, is_native, open_native, read_model
from meshlm.conversion.native.target import NativeTarget
from meshlm.conversion.opening import open_source, read_model_config
from meshlm.conversion.parts import stacked_name
from meshlm.conversion.sidecar import Sidecar
from meshlm.conversion.source import Source
from meshlm.core.config import to_dict, to_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.tree import cast_floating, to_named
from meshlm.data.tokenizer import load_gpt2
from meshlm.model.families import with_embedding_bias
from meshlm.step import init_state

CONFIG = with_embedding_bias(tiny.CONFIG)
RECORD = to_json({"run": {"model": to_dict(CONFIG), "preset": "test"}, "options": {}})


def save(folder: Path, arrays, *steps: int, files=None) -> Path:
    with Checkpointer(folder) as checkpointer:
        for step in steps or (5,):
            checkpointer.save(step, arrays, {"config.json": RECORD} if files is None else files)
    return folder


def params_of(dtype: str = "float32", config=CONFIG):
    params = cast_floating(tiny.draw_params(config), jnp.dtype(dtype))
    return {"params." + name: array for name, array in to_named(params).items()}


def train_state(config=CONFIG):
    """Every array of a run's checkpoint, all of them different."""
    state = init_state(tiny.step_config(config), 0)
    named = to_named(state)
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.standard_normal(a.shape), a.dtype) if a.ndim else a + 3
        for name, a in named.items()
    }


def read_all(source: Source, group="params") -> dict[str, np.ndarray]:
    return {n: part.read(n) for part in source.parts(group) for n in part.tensors}


def assert_is(found: dict[str, np.ndarray], stored, prefix: str) -> None:
    count = 0
    for name, array in found.items():
        stacked, layer = stacked_name(name)
        wanted = np.asarray(stored[prefix + stacked])
        wanted = wanted if layer is None else wanted[layer]
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype), name
        assert array.tobytes() == wanted.tobytes(), name
        count += 1
    assert count == 6 + 10 * CONFIG.num_layers


def rewrite(folder: Path, source: Source, **changes) -> NativeTarget:
    """Writes a source as a native checkpoint."""
    folder.mkdir()
    given = {name: getattr(source, name) for name in ("model", "infos", "groups", "step", "counts")}
    target = NativeTarget(
        folder, **{**given, "tokenizer": source.tokenizer, "sidecar": source.sidecar, **changes}
    )
    for group in changes.get("groups", source.groups):
        for part in source.parts(group, target.order):
            target.write(group, part)
    target.finish()
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_is_read_layer_by_layer(tmp_path, dtype):
    arrays = params_of(dtype)
    source = open_native(save(tmp_path / "checkpoints", arrays))
    assert (source.kind, source.step, source.groups) == ("meshlm", 5, ("params",))
    assert (source.model, source.tokenizer, source.sidecar) == (CONFIG, None, None)
    assert {i.dtype.name for i in source.infos.values()} == {dtype}
    assert_is(read_all(source), arrays, "params.")
    assert [part.key for part in source.parts(order=["head", 1, "embedding", 0])] == [
        *("head", 1, "embedding", 0)
    ]


def test_a_run_gives_its_newest_good_step_and_its_moments(tmp_path):
    arrays = train_state()
    run = tmp_path / "run"
    save(run / "checkpoints", arrays, 5, 9)
    damaged = next((run / "checkpoints/step_9/arrays/state/d").iterdir())
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    source = open_source(run)
    assert (source.step, source.groups) == (5, ("params", "mu", "nu"))
    assert_is(read_all(source, "mu"), arrays, "optimizer.adam.mu.")
    assert_is(read_all(source, "nu"), arrays, "optimizer.adam.nu.")
    part = next(source.parts("mu", [1]))
    assert part.raw[2] == "mu/blocks.1.attention.query.weight"
    assert (
        part.read_raw("mu/blocks.1.attention.query.weight").tobytes()
        == part.read("blocks.1.attention.query.weight").tobytes()
    )


@pytest.mark.parametrize("moment", ["listed", "checked"])
def test_a_step_that_retention_takes_away_meanwhile(tmp_path, monkeypatch, moment):
    """A run that trains on saves the next step, and keeps no other, while its reader begins."""
    run, arrays = tmp_path / "run", params_of()
    save(run / "checkpoints", arrays, 5)

    def train_on(*_) -> None:
        monkeypatch.undo()
        with Checkpointer(run / "checkpoints", keep=1) as checkpointer:
            checkpointer.save(6, arrays, {"config.json": RECORD})

    if moment == "listed":
        verify = restoring.verify
        monkeypatch.setattr(restoring, "verify", lambda path: train_on() or verify(path))
    else:
        reader = native.LayerReader
        monkeypatch.setattr(native, "LayerReader", lambda path: train_on() or reader(path))
    source = open_source(run)
    assert source.step == 6
    assert_is(read_all(source), arrays, "params.")
    # What is gone for good stays an error.
    with pytest.raises(UsageError, match="there is nothing at this path"):
        open_source(run / "checkpoints/step_5")


def test_a_reader_beside_a_run_that_saves_never_sees_a_step_vanish(tmp_path):
    run, arrays = tmp_path / "run", params_of()
    save(run / "checkpoints", arrays, 1)
    done = threading.Event()

    def train() -> None:
        with Checkpointer(run / "checkpoints", keep=1) as checkpointer:
            for step in range(2, 12):
                checkpointer.save(step, arrays, {"config.json": RECORD})
        done.set()

    training = threading.Thread(target=train)
    training.start()
    seen = []
    while not done.is_set():
        source = open_source(run)
        assert_is(read_all(source), arrays, "params.")
        seen.append(source.step)
    training.join()
    assert seen == sorted(seen)
    assert open_source(run).step == 11


def test_converted_checkpoint_reads_back_with_all_its_files(tmp_path):
    arrays = params_of("bfloat16")
    source = open_native(save(tmp_path / "checkpoints", arrays))
    sidecar = Sidecar(shards=2, arrays={"step": np.array([5, 5], np.int32)})
    source.sidecar, source.tokenizer, source.step = sidecar, load_gpt2(), None
    written = tmp_path / "written"
    assert rewrite(written, source).notes == []
    assert checkpoint.verify(written) == []
    again = open_source(written)
    assert (again.model, again.step, again.groups) == (CONFIG, None, ("params",))
    assert again.sidecar is not None
    assert again.sidecar.arrays["step"].tolist() == [5, 5]
    assert again.tokenizer is not None
    assert again.tokenizer.fingerprint == load_gpt2().fingerprint
    assert_is(read_all(again), arrays, "params.")


def test_moments_make_a_checkpoint_that_training_goes_on_from(tmp_path):
    """The names, shapes and dtypes of a TrainState, which is what a run restores."""
    arrays = train_state()
    source = open_native(save(tmp_path / "checkpoints", arrays))
    rewrite(tmp_path / "written", source)
    abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
    restored = checkpoint.restore(tmp_path / "written", abstract)
    for name, array in arrays.items():
        if array.ndim:
            assert np.asarray(restored[name]).tobytes() == np.asarray(array).tobytes(), name
    counters = {name: int(a) for name, a in restored.items() if not a.ndim}
    assert counters == {
        "step": 5,
        "optimizer.adam.count": 3,
        "skipped": 0,
        "skipped_in_a_row": 0,
    }


def test_adams_own_count_goes_along(tmp_path):
    source = open_native(save(tmp_path / "checkpoints", train_state()))
    rewrite(tmp_path / "written", source, counts={"adam": 77, "schedule": 5})
    name = "optimizer.adam.count"
    restored = checkpoint.restore(
        tmp_path / "written", {name: jax.ShapeDtypeStruct((), jnp.int32)}, subset=True
    )
    assert int(restored[name]) == 77
    assert open_native(tmp_path / "written").counts == {"adam": 77, "schedule": 5}


def test_layers_of_several_types_become_float32(tmp_path):
    source = open_native(save(tmp_path / "checkpoints", params_of("bfloat16")))
    infos = dict(source.infos)
    wider = dataclasses.replace(
        infos["blocks.1.feed_forward.up.weight"], dtype=np.dtype(np.float32)
    )
    target = rewrite(
        tmp_path / "w", source, infos=infos | {"blocks.1.feed_forward.up.weight": wider}
    )
    assert target.notes == [
        "blocks.feed_forward.up.weight: its layers differ in type; stored as float32"
    ]
    found = open_source(tmp_path / "w").infos
    assert found["blocks.0.feed_forward.up.weight"].dtype == np.float32
    assert found["blocks.0.feed_forward.down.weight"].dtype == jnp.bfloat16


def damage_array(folder: Path, arrays):
    path = max((folder / "step_5/arrays").rglob("*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


DAMAGE = {
    "bytes": (lambda a: a, RECORD, damage_array, r"is damaged \(.*checksum is wrong"),
    "shape": (
        lambda a: a | {"params.head.weight": jnp.zeros((3, 4))},
        RECORD,
        None,
        r"array params\.head\.weight is float32\[3,4\] in it, and \[48, 24\]",
    ),
    "missing": (
        lambda a: {n: v for n, v in a.items() if n != "params.blocks.attention.key.weight"},
        RECORD,
        None,
        r"array params\.blocks\.attention\.key\.weight is absent in it",
    ),
    "unknown": (
        lambda a: a | {"params.blocks.gate": jnp.zeros((2, 4))},
        RECORD,
        None,
        r"array params\.blocks\.gate is none of its model's",
    ),
    "integers": (
        lambda a: a | {"params.head.bias": jnp.zeros(48, jnp.int32)},
        RECORD,
        None,
        r"params\.head\.bias is int32: weights are float32",
    ),
    "no model": (lambda a: a, b"{}", None, "tells of no model"),
    "no JSON": (lambda a: a, b"\xff", None, "is not JSON"),
    "a list": (lambda a: a, b"[]", None, "is a list, not a JSON object"),
    "unknown key": (
        lambda a: a,
        to_json({"model": {**to_dict(CONFIG), "window": 3}}),
        None,
        "unknown setting 'window'",
    ),
    "odd value": (
        lambda a: a,
        to_json({"model": {**to_dict(CONFIG), "rotary_dim": 3}}),
        None,
        "rotary_dim is 3",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, kind):
    change, config, damage, message = DAMAGE[kind]
    folder = tmp_path / "checkpoints"
    save(folder, change(params_of()), files={"config.json": config})
    if damage:
        damage(folder, None)
    with pytest.raises(BadInputError, match=message) as caught:
        open_native(folder)
    assert "\n" not in str(caught.value)


def test_what_is_nothing_is_told_with_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match="nothing at this path"):
        open_source(tmp_path / "absent")
    with pytest.raises(UsageError, match="nothing at this path"):
        find_checkpoint(tmp_path / "absent")
    (tmp_path / "notes.md").touch()
    with pytest.raises(UsageError, match=r"looked for a run .*Hugging Face.*step_N/shard_0"):
        open_source(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert is_native(tmp_path)
    with pytest.raises(UsageError, match="holds no finished checkpoint"):
        open_source(tmp_path)


def test_options_that_do_not_fit_the_format(tmp_path):
    folder = save(tmp_path / "checkpoints", params_of())
    with pytest.raises(UsageError, match="--config gpt-j-6b: only the original's"):
        open_source(folder, config="gpt-j-6b")
    with pytest.raises(UsageError, match=r"--tokenizer gpt2 has 50257 tokens, .*48 rows"):
        open_source(folder, tokenizer="gpt2")


def test_model_configs_by_name_and_by_file(tmp_path):
    assert read_model_config("gpt-j-6b").num_layers == 28
    own, original, other = (tmp_path / name for name in ("own.json", "6B.json", "other.json"))
    own.write_bytes(RECORD)
    own.rename(tmp_path / "config.json")
    assert read_model_config(tmp_path / "config.json") == CONFIG
    assert read_model({"config.json": RECORD}, "here") == CONFIG
    fixture = Path(__file__).parents[1] / "fixtures/mtj/dev_s4_distinct/config.json"
    original.write_bytes(fixture.read_bytes())
    assert read_model_config(original).num_heads == json.loads(fixture.read_bytes())["n_heads"]
    other.write_text('{"a": 1}')
    with pytest.raises(BadInputError, match=r"other\.json"):
        read_model_config(other)
    with pytest.raises(UsageError, match="no such preset"):
        read_model_config("gpt-k")
