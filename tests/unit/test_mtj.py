"""The original's checkpoints: every number where numpy finds it by hand, and back to the byte."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import original
from meshlm.conversion.cast import CastPart
from meshlm.conversion.mtj.shares import Shares
from meshlm.conversion.mtj.source import is_mtj, open_mtj
from meshlm.conversion.mtj.target import MtjTarget
from meshlm.conversion.parts import part_keys
from meshlm.conversion.sidecar import Sidecar
from meshlm.conversion.source import Source
from meshlm.core.errors import BadInputError, UsageError
from meshlm.formats import archive
from meshlm.formats.tensor import TensorInfo
from meshlm.model.config import ModelConfig
from meshlm.model.families import with_embedding_bias
from original import BFLOAT16, leaf, make_trees, small

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mtj" / "dev_s4_distinct"
CASES = [(np.float32, 1), (np.float32, 2), (np.float16, 4), (BFLOAT16, 2), (BFLOAT16, 4)]


def read(source: Source, group="params") -> dict[str, np.ndarray]:
    return {name: part.read(name) for part in source.parts(group) for name in part.tensors}


def by_hand(trees, model: ModelConfig, group: str = "params") -> dict[str, np.ndarray]:
    """The native tensors, each written out."""
    n, h, d = model.num_heads, model.head_dim, model.d_model

    def get(module: str, name: str) -> list[np.ndarray]:
        return leaf(trees, module, name, group)

    def total(shares: list[np.ndarray]) -> np.ndarray:
        if group != "params" or len(shares) == 1:
            return shares[0]
        return np.sum([np.asarray(x, np.float64) for x in shares], axis=0).astype(np.float32)

    embedding, head = "embedding_shard/~/linear", "projection_shard/~/linear"
    norm = "projection_shard/~/replicated_layer_norm"
    result = {
        "embedding.tokens": np.concatenate(get(embedding, "w"), axis=0),
        "embedding.bias": total(get(embedding, "b")),
        "final_norm.scale": get(norm, "scale")[0],
        "final_norm.offset": get(norm, "offset")[0],
        "head.weight": np.concatenate(get(head, "w"), axis=1).T,
        "head.bias": np.concatenate(get(head, "b")),
    }
    for i in range(model.num_layers):
        layer, to = f"layer_{i}/~/", f"blocks.{i}."
        heads = {"query": "linear", "value": "linear_1", "key": "linear_2"}
        for name, module in heads.items():
            joined = np.concatenate(get(layer + module, "w"), axis=1)
            result[f"{to}attention.{name}.weight"] = joined.T.reshape(n, h, d)
        out = np.concatenate(get(layer + "linear_3", "w"), axis=0)
        result[to + "attention.out.weight"] = out.T.reshape(d, n, h)
        up = np.concatenate(get(layer + "linear_4", "w"), axis=1)
        down = np.concatenate(get(layer + "linear_5", "w"), axis=0)
        result[to + "feed_forward.up.weight"] = up.T
        result[to + "feed_forward.up.bias"] = np.concatenate(get(layer + "linear_4", "b"))
        result[to + "feed_forward.down.weight"] = down.T
        result[to + "feed_forward.down.bias"] = total(get(layer + "linear_5", "b"))
        result[to + "attention_norm.scale"] = get(layer + "replicated_layer_norm", "scale")[0]
        result[to + "attention_norm.offset"] = get(layer + "replicated_layer_norm", "offset")[0]
    return result


def assert_same(read: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert read.keys() == wanted.keys()
    for name, array in wanted.items():
        assert read[name].dtype == array.dtype, name
        assert read[name].shape == array.shape, name
        assert read[name].tobytes() == array.tobytes(), name


def write_back(source: Source, folder: Path, shards: int, **changes) -> MtjTarget:
    folder.mkdir()
    arguments = {
        "model": source.model,
        "infos": source.infos,
        "groups": source.groups,
        "tokenizer": None,
        "step": source.step,
        "counts": source.counts,
        "sidecar": source.sidecar,
        "shards": shards,
    }
    target = MtjTarget(folder, **(arguments | changes))
    for group in target.group_order:
        for part in source.parts(group, target.order):
            target.write(group, part)
    target.finish()
    return target


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.npz")}


@pytest.mark.parametrize(("dtype", "shards"), CASES)
def test_reads_every_tensor(tmp_path, dtype, shards):
    model = small()
    trees = make_trees(model, shards, dtype)
    original.write_config(tmp_path / "config.json", model)
    source = open_mtj(original.write(tmp_path, trees))
    assert (source.model, source.step, source.groups) == (model, 7, ("params",))
    wanted = by_hand(trees, model)
    assert_same(read(source), wanted)
    shapes = {name: (a.shape, a.dtype) for name, a in wanted.items()}
    assert {name: (i.shape, i.dtype) for name, i in source.infos.items()} == shapes


@pytest.mark.parametrize("savez", [np.savez_compressed, original.savez_to_bucket])
def test_reads_every_way_that_numpy_writes(tmp_path, savez):
    model = small()
    trees = make_trees(model, 2, BFLOAT16)
    original.write(tmp_path, trees, savez)
    assert_same(read(open_mtj(tmp_path, model)), by_hand(trees, model))


def test_moments_are_read_and_not_summed(tmp_path):
    model = small(num_layers=12)
    trees = make_trees(model, 2, np.float32, full=True)
    original.write(tmp_path, trees)
    source = open_mtj(tmp_path, model)
    assert source.groups == ("params", "mu", "nu")
    for group in source.groups:
        assert_same(read(source, group), by_hand(trees, model, group))
    assert source.sidecar is not None
    counts = {name: source.sidecar.arrays[name].tolist() for name in ("step", "adam_count")}
    assert counts == {"step": [7, 7], "adam_count": [8, 8]}
    assert source.sidecar.arrays["schedule_count"].tolist() == [4, 4]


def test_raw_tensors_have_the_originals_names(tmp_path):
    model = small(num_layers=11)
    trees = make_trees(model, 2, np.float32, full=True)
    original.write(tmp_path, trees)
    source = open_mtj(tmp_path, model)
    (part,) = source.parts("mu", [10])
    wanted = leaf(trees, "layer_10/~/linear_5", "w", "mu")[1]
    assert part.read_raw("shard_1/mu/layer_10/linear_5/w").tobytes() == wanted.tobytes()
    assert len(part.raw) == 20
    (part,) = source.parts("params", ["head"])
    wanted = leaf(trees, "projection_shard/~/replicated_layer_norm", "offset")[1]
    name = "shard_1/projection_shard/replicated_layer_norm/offset"
    assert part.read_raw(name).tobytes() == wanted.tobytes()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_layers=st.sampled_from([1, 2, 9, 10, 11, 12, 13]),
    shards=st.sampled_from([1, 2, 3, 6]),
    dtype=st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]),
    full=st.booleans(),
)
def test_there_and_back_is_the_same_to_the_byte(tmp_path_factory, num_layers, shards, dtype, full):
    tmp_path = tmp_path_factory.mktemp("there")
    model = small(num_layers, num_heads=6)
    trees = make_trees(model, shards, np.float32 if full else dtype, full=full)
    step_folder = original.write(tmp_path, trees)
    source = open_mtj(step_folder, model)
    target = write_back(source, tmp_path / "back", shards)
    assert target.notes == []
    assert files(tmp_path / "back" / "step_7") == files(step_folder)
    again = open_mtj(tmp_path / "back")
    assert again.model == model
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("was", "becomes"), [(4, 1), (4, 2), (1, 4), (2, 6), (3, 6), (6, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_another_shard_count_has_the_same_tensors(tmp_path, was, becomes, dtype):
    model = small(num_heads=12)
    trees = make_trees(model, was, dtype)
    source = open_mtj(original.write(tmp_path, trees), model)
    target = write_back(source, tmp_path / "out", becomes)
    assert target.notes == [f"sidecar dropped: it is of {was} shards, not of {becomes}"]
    wide = {k: a.astype(np.float64) for k, a in read(source).items()}
    for name, array in read(open_mtj(tmp_path / "out")).items():
        assert array.astype(np.float64).tobytes() == wide[name].tobytes(), name


def test_new_shards_are_as_the_original_leaves_them(tmp_path):
    """Norms trained in the first shard alone; biases and their moments the same in all."""
    model = small()
    trees = make_trees(model, 1, np.float32, full=True)
    source = open_mtj(original.write(tmp_path, trees), model)
    write_back(source, tmp_path / "out", 4)
    again = open_mtj(tmp_path / "out")
    assert again.sidecar is not None
    arrays = again.sidecar.arrays
    bias = leaf(trees, "layer_1/~/linear_5", "b")[0]
    assert arrays["params.blocks.1.feed_forward.down.bias"].tolist() == [(bias / 4).tolist()] * 4
    moment = leaf(trees, "layer_1/~/linear_5", "b", "nu")[0].tolist()
    assert arrays["nu.blocks.1.feed_forward.down.bias"].tolist() == [moment] * 4
    for group, fill in (("params", 1), ("mu", 0)):
        scale = arrays[f"{group}.final_norm.scale"]
        wanted = leaf(trees, "projection_shard/~/replicated_layer_norm", "scale", group)[0]
        assert scale[0].tolist() == wanted.tolist()
        assert (scale[1:] == fill).all()
    assert (arrays["params.final_norm.offset"][1:] == 0).all()
    counts = {name: arrays[name].tolist() for name in ("step", "adam_count", "schedule_count")}
    assert counts == {"step": [7] * 4, "adam_count": [8] * 4, "schedule_count": [4] * 4}
    write_back(source, tmp_path / "later", 1, step=9, counts={})
    later = open_mtj(tmp_path / "later").sidecar
    assert later is not None
    assert [later.arrays[name].tolist() for name in counts] == [[9], [9], [9]]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]),
)
def test_shares_sum_to_the_bias(total, shards, dtype):
    bias = np.array(total, np.float32)
    shares = Shares().split(bias, shards, dtype)
    assert len(shares) == shards
    assert len({share.dtype for share in shares}) == 1
    assert sum(np.asarray(share, np.float64) for share in shares).tolist() == bias.tolist()


def test_a_changed_tensor_is_not_taken_from_the_sidecar(tmp_path):
    model = small()
    trees = make_trees(model, 2, np.float32)
    source = open_mtj(original.write(tmp_path, trees), model)
    leaf(trees, "layer_0/~/linear_5", "b")[0][:] = 5
    leaf(trees, "layer_0/~/replicated_layer_norm", "scale")[0][:] = 6
    changed = open_mtj(original.write(tmp_path / "changed", trees), model)
    target = write_back(changed, tmp_path / "out", 2, sidecar=source.sidecar)
    assert target.notes == [
        "sidecar dropped where params.blocks.0.feed_forward.down.bias and 1 other tensors have "
        "changed since"
    ]
    assert_same(read(open_mtj(tmp_path / "out")), read(changed))


def test_another_dtype_drops_the_sidecar(tmp_path):
    model = small()
    source = open_mtj(original.write(tmp_path, make_trees(model, 2, BFLOAT16)), model)
    wide = np.dtype(np.float32)
    infos = {n: TensorInfo(shape=i.shape, dtype=wide) for n, i in source.infos.items()}
    (tmp_path / "out").mkdir()
    target = MtjTarget(
        tmp_path / "out",
        model=model,
        infos=infos,
        groups=("params",),
        tokenizer=None,
        step=None,
        counts=source.counts,
        sidecar=source.sidecar,
        shards=2,
    )
    for part in source.parts("params", target.order):
        target.write("params", CastPart(part, wide))
    target.finish()
    assert "sidecar dropped" in target.notes[0]
    again = open_mtj(tmp_path / "out")
    assert again.step == 0
    assert_same(read(again), {n: a.astype(np.float32) for n, a in read(source).items()})


def test_a_model_without_an_embedding_bias_gets_one_of_zeros(tmp_path):
    model = small()
    source = open_mtj(original.write(tmp_path, make_trees(model, 2, np.float32)), model)
    bare = with_embedding_bias(model, False)
    (tmp_path / "out").mkdir()
    infos = {name: info for name, info in source.infos.items() if name != "embedding.bias"}
    target = MtjTarget(
        tmp_path / "out",
        model=bare,
        infos=infos,
        groups=("params",),
        tokenizer=None,
        step=3,
        counts={},
        sidecar=None,
        shards=2,
    )
    for part in source.parts("params", target.order):
        part.tensors = {n: i for n, i in part.tensors.items() if n in infos}
        target.write("params", part)
    target.finish()
    assert target.model == model
    bias = read(open_mtj(tmp_path / "out"))["embedding.bias"]
    assert bias.tolist() == [0] * model.d_model


@pytest.mark.parametrize(
    "arrays",
    [
        {"step": np.zeros((2, 3), np.int32)},
        {"step": np.array([np.nan, 1], np.float32)},
        {"step": np.zeros(2, bool)},
        {"params.final_norm.scale": np.zeros((2, 3), np.int32)},
        {"params.final_norm.scale": np.zeros(2, np.float32)},
    ],
    ids=["dims", "fraction", "bool", "integers", "vector"],
)
def test_what_no_sidecar_has_is_refused(arrays):
    data = Sidecar(shards=2, arrays=arrays).to_bytes()
    with pytest.raises(BadInputError, match=r"^x: "):
        Sidecar.from_bytes(data, "x")


@pytest.mark.parametrize("count", [-5, 1 << 40])
def test_a_step_that_no_run_reaches_is_refused(tmp_path, count):
    model = small()
    trees = make_trees(model, 1, np.float32)
    trees[0]["step"] = np.array(count, np.int64)
    with pytest.raises(BadInputError, match=f"step is {count}"):
        open_mtj(original.write(tmp_path, trees), model)


def test_a_config_of_very_many_layers_costs_nothing(tmp_path):
    model = small()
    path = original.write(tmp_path, make_trees(model, 1, np.float32))
    tracemalloc.start()
    with pytest.raises(BadInputError, match="with 2000000000 layers"):
        open_mtj(path, dataclasses.replace(model, num_layers=2_000_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_deflated_arrays_may_not_grow_without_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "FREE_BYTES", 0)
    model = small()
    trees = jax.tree.map(np.zeros_like, make_trees(model, 1, np.float32))
    path = original.write(tmp_path, trees)
    for file in path.rglob("*.npz"):
        with np.load(file) as stored:
            np.savez_compressed(file, *stored.values())
    monkeypatch.setattr(archive, "MAX_GROWTH", 1)
    with pytest.raises(BadInputError, match="would grow to"):
        open_mtj(path, model)


def test_the_sidecar_survives_its_file(tmp_path):
    model = small()
    source = open_mtj(original.write(tmp_path, make_trees(model, 2, BFLOAT16)), model)
    assert source.sidecar is not None
    again = Sidecar.from_bytes(source.sidecar.to_bytes(), "x")
    assert again.shards == 2
    assert_same(dict(again.arrays), dict(source.sidecar.arrays))
    with pytest.raises(BadInputError, match="x"):
        Sidecar.from_bytes(source.sidecar.to_bytes()[:-1], "x")
    damaged = dataclasses.replace(source.sidecar, shards=3).to_bytes()
    with pytest.raises(BadInputError, match=r"x: .* nothing that '3' shards have"):
        Sidecar.from_bytes(damaged, "x")


def test_the_recorded_checkpoint():
    source = open_mtj(FIXTURE / "slim")
    assert source.step == 383500
    assert source.model.num_layers == 2
    shards = [FIXTURE / "slim/step_383500" / f"shard_{s}" for s in range(4)]
    shares = [np.load(shard / "0.npz")["arr_0"] for shard in shards]
    wanted = np.sum(np.stack(shares).astype(np.float64), axis=0).astype(np.float32)
    assert len({share.tobytes() for share in shares}) == 4
    part = next(iter(source.parts()))
    assert part.read("embedding.bias").tobytes() == wanted.tobytes()


def test_the_recorded_checkpoint_there_and_back(tmp_path):
    write_back(open_mtj(FIXTURE / "slim/step_383500"), tmp_path / "out", 4)
    assert files(tmp_path / "out") == files(FIXTURE / "slim")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta == json.loads((FIXTURE / "slim/meta.json").read_text())
    config = json.loads((FIXTURE / "config.json").read_text())
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {key: config[key] for key in written}


def test_order_is_the_callers(tmp_path):
    model = small()
    source = open_mtj(original.write(tmp_path, make_trees(model, 2, np.float32)), model)
    assert [part.key for part in source.parts()] == part_keys(model)
    assert [part.key for part in source.parts(order=[1, "head"])] == [1, "head"]


@pytest.mark.parametrize(
    ("change", "shards", "why"),
    [
        ({}, 3, "--shards 3: 4 heads .* one of 1, 2, 4"),
        ({"vocab_size": 22}, 4, "--shards 4: 22 rows of vocabulary .* one of 1, 2"),
        ({"vocab_size": 22}, 0, "--shards 0"),
        ({"d_ff": 100}, 2, "no place for d_ff 100"),
        ({"head_dim": 6}, 2, "num_heads x head_dim 24"),
        ({"layer_norm_epsilon": 1e-6}, 2, "layer_norm_epsilon 1e-06"),
        ({"rotary_base": 500.0}, 2, "rotary_base 500"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, change, shards, why):
    with pytest.raises(UsageError, match=why):
        MtjTarget(
            tmp_path,
            model=dataclasses.replace(small(), **change),
            infos={},
            groups=("params",),
            tokenizer=None,
            step=1,
            counts={},
            sidecar=None,
            shards=shards,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    original.write_config(tmp_path / "config.json", small())
    original.write(tmp_path / "slim", make_trees(small(), 2, np.float32))
    return tmp_path / "slim" / "step_7"


def rewrite(path: Path, change) -> None:
    with np.load(path) as file:
        arrays = [file[name] for name in file.files]
    np.savez(path, *change(arrays))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda step: shutil.rmtree(step / "shard_0"), "no shard_0"),
        (lambda step: shutil.rmtree(step / "shard_1"), r"arr_1 \(shard_0/embedding_shard/linear/w"),
        (lambda step: (step / "shard_3").mkdir(), "3 shards, shard_3 among them, but no shard_2"),
        (lambda step: (step / "shard_x").mkdir(), "no shard_2"),
        (lambda step: (step / "shard_2").mkdir(), "shard_2 has no 0.npz"),
        (lambda step: (step / "shard_1/5.npz").unlink(), "shard_1 has no 5.npz"),
        (lambda step: shutil.copy(step / "shard_1/5.npz", step / "shard_1/16.npz"), "16.npz"),
        (lambda step: rewrite(step / "shard_1/0.npz", lambda a: a[:1]), "shard_1/0.npz has 1"),
        (
            lambda step: rewrite(step / "shard_1/15.npz", lambda a: [*a, *a]),
            "of the 28 in this shard",
        ),
        (
            lambda step: rewrite(step / "shard_1/2.npz", lambda a: [a[0], a[1].T]),
            r"shard_1/2.npz arr_1 \(shard_1/layer_0/linear_3/w\) is \[16, 8\] and should be",
        ),
        (
            lambda step: rewrite(step / "shard_1/2.npz", lambda a: [x.astype("f2") for x in a]),
            "is float16 and float32 in shard_0",
        ),
        (
            lambda step: rewrite(step / "shard_1/2.npz", lambda a: [x.astype("i4") for x in a]),
            "is int32, not one of",
        ),
        (
            lambda step: rewrite(step / "shard_1/2.npz", lambda a: [x.astype("O") for x in a]),
            "shard_1/2.npz arr_0 is an array of pickled objects",
        ),
        (lambda step: (step / "shard_1/3.npz").write_bytes(b""), "shard_1/3.npz is empty"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, why):
    damage(checkpoint)
    with pytest.raises(BadInputError, match=why) as caught:
        open_mtj(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_found_when_it_is_read(checkpoint):
    path = checkpoint / "shard_1" / "4.npz"
    data = bytearray(path.read_bytes())
    data[-400] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"shard_1/4\.npz arr_. is damaged"):
        read(open_mtj(checkpoint))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_layers": 3}, "27 arrays; with 3 layers"),
        ({"vocab_size": 48}, r"is \[12, 16\] and should be \[24, 16\]"),
        ({"num_heads": 1, "head_dim": 16}, "cannot be in 2 shards"),
        ({"d_ff": 32}, "d_ff 32"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(checkpoint, change, why):
    with pytest.raises(BadInputError, match=f"does not fit the config given: .*{why}"):
        open_mtj(checkpoint, dataclasses.replace(small(), **change))


def test_finds_what_is_meant(checkpoint):
    parent = checkpoint.parent
    assert not is_mtj(checkpoint.parent.parent / "config.json")
    assert is_mtj(checkpoint)
    assert is_mtj(parent)
    assert not is_mtj(parent.parent)
    assert open_mtj(parent).step == 7
    shutil.copytree(checkpoint, parent / "step_10")
    with pytest.raises(BadInputError, match=r"no meta\.json .* there: step_7, step_10"):
        open_mtj(parent)
    meta = parent / "meta.json"
    meta.write_text('{"step": 10, "checkpoints": [7, 10], "aux": {}}')
    shards = parent / "step_10" / "shard_1"
    shutil.rmtree(shards)
    with pytest.raises(BadInputError, match="step_10"):
        open_mtj(parent)
    shutil.rmtree(parent / "step_10")
    with pytest.raises(BadInputError, match=r"lists step_10 last, which is not there; .* step_7"):
        open_mtj(parent)
    meta.write_text("{")
    with pytest.raises(BadInputError, match="lists no checkpoints"):
        open_mtj(parent)
    with pytest.raises(UsageError, match="nothing at this path"):
        open_mtj(parent / "step_9")


def test_finds_the_config_up_to_two_levels_above(checkpoint):
    top = checkpoint.parent.parent
    wanted = small()
    assert open_mtj(checkpoint).model == wanted
    (top / "other.json").write_text('{"model_type": "gptj"}')
    (top / "broken.json").write_text("{")
    assert open_mtj(checkpoint).model == wanted
    original.write_config(checkpoint / "same.json", wanted, lr=1e-4)
    assert open_mtj(checkpoint).model == wanted
    original.write_config(checkpoint / "twice.json", wanted)
    with pytest.raises(
        BadInputError, match=r"several configs .*same\.json, .*twice\.json, .*--config"
    ):
        open_mtj(checkpoint)
    (checkpoint / "twice.json").unlink()
    original.write_config(checkpoint / "same.json", dataclasses.replace(wanted, rotary_dim=4))
    with pytest.raises(BadInputError, match=r"several configs .*same\.json, .*config\.json"):
        open_mtj(checkpoint)
    (checkpoint / "same.json").unlink()
    (top / "config.json").unlink()
    with pytest.raises(BadInputError, match=r"no JSON config .* give --config"):
        open_mtj(checkpoint)
    assert open_mtj(checkpoint, wanted).model == wanted
