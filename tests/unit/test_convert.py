"""`convert`: every way between the formats, and nothing left behind where one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import tiny
from meshlm import checkpoint
from meshlm.checkpoint import Checkpointer
from meshlm.cli import convert as command
from meshlm.conversion import convert as module
from meshlm.conversion import destination as destinations
from meshlm.conversion.convert import convert
from meshlm.conversion.native.target import NativeTarget
from meshlm.conversion.opening import open_source
from meshlm.core.config import to_dict, to_json
from meshlm.core.errors import BadInputError, MeshLMError, StoppedError, UsageError
from meshlm.core.tree import to_named
from meshlm.model.families import with_embedding_bias

FIXTURE = Path(__file__).parents[1] / "fixtures/mtj/dev_s4_distinct"
CONFIG = with_embedding_bias(dataclasses.replace(tiny.CONFIG, d_ff=96))


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """A checkpoint in float32, of a shape that every format can have."""
    params = tiny.draw_params(CONFIG)
    arrays = {"params." + name: array for name, array in to_named(params).items()}
    files = {"config.json": to_json({"run": {"model": to_dict(CONFIG)}})}
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(7, arrays, files)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The recorded original, as a checkpoint of MeshLM's."""
    path = tmp_path_factory.mktemp("converted") / "original"
    convert(open_source(FIXTURE / "slim"), path, to="meshlm")
    return path


def arrays_of(folder: Path) -> dict[str, bytes]:
    """Every array of the original's npz files, read by numpy."""
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as arrays:
            for name in arrays.files:
                found[f"{path.parent.name}/{path.name}/{name}"] = arrays[name].tobytes()
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_original_comes_back_byte_for_byte(original, tmp_path):
    again = tmp_path / "again"
    certificate = convert(open_source(original), again, to="mtj", shards=4)
    assert arrays_of(again) == arrays_of(FIXTURE / "slim")
    assert len(arrays_of(again)) == 4 * 27
    assert certificate.notes == []
    assert certificate.other_tensors == {}
    record = json.loads((again / "certificate.json").read_bytes())
    assert record["destination"]["path"] == str(again)
    assert record["source"]["format"] == "meshlm"
    name = "shard_2/layer_1/linear_5/b"
    with np.load(FIXTURE / "slim/step_383500/shard_2/0.npz") as first:
        leaf = first["arr_0"]
    hashes = {t["sha256"] for t in record["destination"]["tensors"].values()}
    assert name in record["destination"]["tensors"]
    assert hashlib.sha256(leaf.tobytes()).hexdigest() in hashes


def test_the_certificate_is_part_of_a_converted_checkpoint(original):
    assert checkpoint.verify(original) == []
    record = json.loads(checkpoint.read_files(original)["certificate.json"])
    assert record["certificate"] == 1
    assert record["same_tensors"] == 26
    assert record["dtype"] is None
    assert not record["is_lossy"]
    assert all(d["relative"] <= 2e-5 for d in record["distances"].values())
    assert record["versions"]["numpy"] == np.__version__
    assert sorted(record["source"]["files"])[0].startswith("meta.json")
    assert leftovers(original.parent) == []


def test_around_all_formats_the_numbers_stay(native, tmp_path):
    hf, mtj, last = (tmp_path / name for name in ("hf", "mtj", "last"))
    to_hf = convert(open_source(native), hf, to="hf")
    assert set(to_hf.other_tensors) == {"embedding.tokens", "embedding.bias"}
    to_mtj = convert(open_source(hf), mtj, to="mtj", shards=2)
    assert to_mtj.other_tensors == {"embedding.bias": "zeros: this format always has one"}
    back = convert(open_source(mtj), last, to="hf")
    assert back.other_tensors == {"embedding.bias": "part of the embedding here"}
    first, again = (open_source(path) for path in (hf, last))
    for here, there in zip(first.parts(), again.parts(), strict=True):
        for name in here.tensors:
            assert np.array_equal(here.read(name), there.read(name)), name


def test_moments_go_both_ways_and_not_with_rounded_weights(tmp_path):
    """Adam's moments in a checkpoint of a run, in the original's full layout, and back."""
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in to_named(tiny.draw_params(CONFIG)).items()}
    arrays = {
        prefix + name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for prefix in ("params.", "optimizer.adam.mu.", "optimizer.adam.nu.")
        for name, shape in shapes.items()
    }
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(9, arrays, {"config.json": to_json({"model": to_dict(CONFIG)})})
    full, back = tmp_path / "full", tmp_path / "back"
    assert convert(open_source(tmp_path / "run"), full, to="mtj", shards=2).other_tensors == {}
    again = convert(open_source(full), back, to="meshlm")
    assert (again.same_tensors, again.other_tensors, again.notes) == (78, {}, [])
    assert open_source(back).step == 9
    abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
    restored = checkpoint.restore(back, abstract, subset=True)
    for name, array in arrays.items():
        assert np.asarray(restored[name]).tobytes() == np.asarray(array).tobytes(), name
    slim = convert(open_source(back), tmp_path / "slim", to="mtj", shards=2, dtype="bfloat16")
    assert slim.notes[0].startswith("Adam's moments are left out")
    assert open_source(tmp_path / "slim").groups == ("params",)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_rounds_once_and_is_said(native, tmp_path, dtype):
    certificate = convert(open_source(native), tmp_path / "out", to="meshlm", dtype=dtype)
    assert certificate.is_lossy == (dtype != "float32")
    assert certificate.other_tensors == {}
    assert {i.dtype.name for i in open_source(tmp_path / "out").infos.values()} == {dtype}
    found = {pair: d.relative for pair, d in certificate.distances.items()}
    if certificate.is_lossy:
        assert 1e-5 < found["source and destination (the rounding)"] < 0.1
    else:
        assert found["source and destination"] == 0


def test_a_narrow_embedding_with_its_bias_is_not_rounded_unasked(native, tmp_path):
    """Even where all tensors, the bias too, are of one narrow type."""
    narrow = tmp_path / "narrow"
    convert(open_source(native), narrow, to="meshlm", dtype="bfloat16")
    certificate = convert(open_source(narrow), tmp_path / "hf", to="hf")
    assert not certificate.is_lossy
    assert open_source(tmp_path / "hf").infos["embedding.tokens"].dtype == np.float32
    rounded = convert(open_source(narrow), tmp_path / "hf16", to="hf", dtype="bfloat16")
    assert rounded.is_lossy
    assert "stored as bfloat16" in rounded.other_tensors["embedding.tokens"]


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path):
    params = tiny.draw_params(CONFIG)
    head = dataclasses.replace(params.head, weight=params.head.weight.at[3, 4].set(1e6))
    named = to_named(dataclasses.replace(params, head=head))
    with Checkpointer(tmp_path / "run") as checkpointer:
        files = {"config.json": to_json({"model": to_dict(CONFIG)})}
        checkpointer.save(1, {"params." + n: a for n, a in named.items()}, files)
    with pytest.raises(BadInputError, match=r"head\.weight has numbers too large for float16"):
        convert(open_source(tmp_path / "run"), tmp_path / "out", to="meshlm", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


class Damaging(NativeTarget):
    """Writes one number of one tensor wrong, by the smallest step that there is."""

    def write(self, group, part):
        read = part.read

        def damaged(name):
            array = read(name)
            if name == "blocks.1.feed_forward.down.weight":
                array = array.copy()
                array[2, 3] = np.nextafter(array[2, 3], np.float32(9))
            return array

        part.read = damaged
        super().write(group, part)


def test_one_wrong_bit_fails_and_leaves_nothing(native, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NativeTarget", Damaging)
    with pytest.raises(
        MeshLMError, match=r"changed blocks\.1\.feed_forward\.down\.weight \(params\)"
    ) as caught:
        convert(open_source(native), tmp_path / "out", to="meshlm")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forward_pass_that_differs_fails_and_leaves_nothing(native, tmp_path, monkeypatch):
    class Other(module.StreamedForward):
        def __init__(self, model, tokens):
            super().__init__(dataclasses.replace(model, rotary_base=9_000.0), tokens)

    monkeypatch.setattr(module, "StreamedForward", Other)
    with pytest.raises(MeshLMError, match="destination and MeshLM differ by"):
        convert(open_source(native), tmp_path / "out", to="hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoppedError("stopped", 75), OSError(28)])
def test_an_interruption_leaves_nothing(native, tmp_path, error):
    def stop(stage, done, total):
        if stage == "checking" and done:
            assert len(leftovers(tmp_path)) == 1
            raise error

    with pytest.raises(type(error)):
        convert(open_source(native), tmp_path / "out", to="hf", progress=stop)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from meshlm.conversion.convert import convert
from meshlm.conversion.opening import open_source

def progress(stage, done, total):
    if stage == "checking":
        os.kill(os.getpid(), signal.SIGKILL)

convert(open_source(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]), to="hf",
        progress=progress)
"""


@pytest.mark.long
def test_a_killed_conversion_leaves_nothing_under_the_name(native, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(native), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(leftovers(tmp_path)) == 1
    convert(open_source(native), out, to="hf")
    assert leftovers(tmp_path) == []


def test_leftovers_go_and_what_is_being_written_stays(native, tmp_path):
    """Another conversion to this name may be running, and another name is not ours."""
    stale, other = tmp_path / ".out.partial-0123abcd", tmp_path / ".other.partial-0123abcd"
    stale.mkdir()
    other.mkdir()
    with destinations.Destination(tmp_path / "out", native, 0, force=False) as running:
        assert sorted(leftovers(tmp_path)) == sorted([other.name, running.name])
        stale.mkdir()
        convert(open_source(native), tmp_path / "out", to="hf")
        assert sorted(leftovers(tmp_path)) == sorted([other.name, running.name])
        shutil.rmtree(tmp_path / "out")
        (running / "file").write_text("x")
    assert leftovers(tmp_path) == [other.name]
    assert (tmp_path / "out/file").read_text() == "x"


def test_what_is_there_is_replaced_only_by_force_and_success(native, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(open_source(native), out, to="hf")
    with pytest.raises(UsageError, match="is there already"):
        convert(open_source(native), out, to="meshlm")
    monkeypatch.setattr(module, "NativeTarget", Damaging)
    with pytest.raises(MeshLMError):
        convert(open_source(native), out, to="meshlm", force=True)
    monkeypatch.undo()
    assert open_source(out).kind == "hf"
    convert(open_source(native), out, to="meshlm", force=True)
    assert open_source(out).kind == "meshlm"
    assert leftovers(tmp_path) == []


def test_force_replaces_weights_and_nothing_else(native, tmp_path):
    source = open_source(native)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/letter.txt").write_text("mine")
    (tmp_path / "project" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(native)
    for name, message in (
        ("file", "is no folder"),
        ("folder", "was not written by meshlm convert"),
        ("project", "was not written by meshlm convert"),
        ("link", "is no folder"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(source, tmp_path / name, to="hf", force=True)
    for path in (source.path, native):
        with pytest.raises(UsageError, match="has the source in it"):
            convert(source, path, to="hf", force=True)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", to="hf", force=True)
    convert(source, tmp_path / "empty", to="mtj", shards=1, force=True)
    assert open_source(tmp_path / "empty").kind == "mtj"


def test_the_disk_is_looked_at_first(native, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 20_000_000, 20_000_000)
    monkeypatch.setattr(destinations.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"0\.03 GB are needed and 0\.02 GB are free"):
        convert(open_source(native), tmp_path / "out", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_shards_that_do_not_divide_are_refused(native, tmp_path):
    with pytest.raises(UsageError, match="shards"):
        convert(open_source(native), tmp_path / "out", to="mtj", shards=3)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_read_and_proved(native, tmp_path, capsys):
    config = command.Config(source=native, destination=tmp_path / "out", to="hf", dtype="bfloat16")
    assert command.run(config) is None
    said = capsys.readouterr().out
    assert "step_7: MeshLM, 2 layers, " in said
    assert "float32, step 7" in said
    assert "note: the embedding bias is added to the embedding" in said
    assert "out: checked, but rounded; written in" in said
    assert "24 of 26 tensors are the source's bit for bit once cast to bfloat16" in said
    assert "destination and MeshLM: logits within" in said
    assert str(tmp_path / "out/certificate.json") in said


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    with contextlib.closing(open(tmp_path / "said", "w")) as file:
        console = Console(file=file, width=200)
        with command._Progress(console) as progress:
            for done in range(5):
                progress.update("writing", done * 10**9, 4 * 10**9)
    lines = (tmp_path / "said").read_text().splitlines()
    assert len(lines) >= 2
    assert lines[-1].startswith("writing: ")
    assert lines[-1].endswith(" min left")
