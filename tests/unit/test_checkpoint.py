"""Checkpoints: what is saved comes back bit for bit; nothing half written or damaged is used."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from meshlm.checkpoint import (
    FORMAT_VERSION,
    Checkpointer,
    check_free_disk,
    clean_leftovers,
    complete_steps,
    estimate_bytes,
    is_layer_stack,
    latest_complete,
    latest_good,
    read_files,
    read_manifest,
    restore,
    restore_latest,
    saving,
    step_path,
    verify,
)
from meshlm.checkpoint.disk import steps_kept
from meshlm.checkpoint.folder import publish
from meshlm.checkpoint.manifest import _seal
from meshlm.core.errors import BadInputError, MeshLMError, UsageError

FILES = {"config.json": b'{"preset": "test"}', "tokenizer.json": b"{}\n"}


def make_state(step: int) -> dict[str, jax.Array]:
    """A small train state whose every value says which step it is of."""
    return {
        "params.blocks.qkv": jnp.full((4, 8, 24), step, jnp.float32),
        "params.embed": jnp.full((16, 8), step, jnp.bfloat16),
        "opt.mu.blocks.qkv": jnp.full((4, 8, 24), -step, jnp.float32),
        "step": jnp.uint32(step),
    }


def abstract_of(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in state.items()}


ABSTRACT = abstract_of(make_state(0))


def assert_same(left: dict[str, jax.Array], right: dict[str, jax.Array]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert np.asarray(array).tobytes() == np.asarray(right[name]).tobytes(), name


def save_steps(folder: Path, *steps: int, keep: int = 100) -> None:
    with Checkpointer(folder, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), FILES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 10 and 20, which tests copy before they spoil it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(folder, 10, 20)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# Round trips.

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]
NAMES = st.from_regex(r"[a-z_][a-z0-9_\-]{0,6}(\.[a-z0-9_]{1,6}){0,3}", fullmatch=True)


@st.composite
def array_bits(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    size = int(np.prod(shape)) * dtype.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    bits = bits & 1 if dtype == np.bool_ else bits
    return bits.view(dtype).reshape(shape)


@settings(max_examples=10)
@given(state=st.dictionaries(NAMES, array_bits(), min_size=1, max_size=8))
def test_any_arrays_come_back_bit_for_bit(state: dict[str, np.ndarray]) -> None:
    arrays = {name: jnp.asarray(value) for name, value in state.items()}
    with tempfile.TemporaryDirectory() as temporary:
        with Checkpointer(Path(temporary)) as checkpointer:
            checkpointer.save(0, arrays)
        path = latest_complete(Path(temporary))
        assert path is not None
        assert verify(path) == []
        restored = restore(path, abstract_of(arrays))
    for name, value in state.items():
        assert restored[name].dtype == value.dtype
        assert np.asarray(restored[name]).tobytes() == value.tobytes(), name


def test_scalars_files_and_manifest(saved: Path) -> None:
    path = step_path(saved, 20)
    assert_same(restore(path, ABSTRACT), make_state(20))
    assert read_files(path) == FILES
    manifest = read_manifest(path)
    assert manifest.step == 20
    assert manifest.versions["jax"] == jax.__version__
    assert str(manifest.arrays["params.embed"]) == "bfloat16[16,8]"
    assert str(manifest.arrays["step"]) == "uint32[]"
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, "manifest.json"}


def test_a_subset_can_be_restored_alone(saved: Path) -> None:
    wanted = {"params.embed": ABSTRACT["params.embed"]}
    restored = restore(step_path(saved, 10), wanted, subset=True)
    assert_same(restored, {"params.embed": make_state(10)["params.embed"]})


MESHES = [(1, 8), (8, 1), (2, 4), (4, 2)]


@pytest.mark.parametrize("shape", [*MESHES, None])
def test_saved_on_one_mesh_restored_on_another(
    tmp_path: Path, shape: tuple[int, int] | None
) -> None:
    bits = np.random.default_rng(0).integers(0, 255, (3, 16, 32), dtype=np.uint8)
    source = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"x.blocks.w": P(None, "data", "model"), "x.rep": P(), "x.part": P(None, "model")}
    state = {n: jax.device_put(bits, NamedSharding(source, spec)) for n, spec in specs.items()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    abstract = abstract_of(state)
    if shape is not None:
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
        target = NamedSharding(mesh, P(None, "model", "data"))
        abstract = {n: jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=target) for n in state}
    restored = restore(step_path(tmp_path, 1), abstract)
    for name, array in restored.items():
        assert np.array_equal(np.asarray(array), bits), name
        if shape is None:
            assert array.sharding.device_set == {jax.local_devices()[0]}
        else:
            assert array.sharding == target


def test_one_layer_is_one_chunk(tmp_path: Path) -> None:
    """Read with tensorstore alone, which is not our code, one layer at a time."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    layers = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4)
    state = {
        "params.blocks.w": jnp.asarray(layers),
        "params.blocks.sharded": jax.device_put(layers, NamedSharding(mesh, P(None, "data"))),
        "params.head": jnp.asarray(layers),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    chunks = {}
    for name in state:
        base = f"file://{step_path(tmp_path, 1)}/arrays/state"
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
        chunks[name] = store.chunk_layout.read_chunk.shape
        assert np.array_equal(store[1].read().result(), layers[1])
    assert chunks == {
        "params.blocks.w": (1, 8, 4),
        "params.blocks.sharded": (1, 1, 4),
        "params.head": (3, 8, 4),
    }


def test_which_names_are_layer_stacks() -> None:
    assert is_layer_stack("params.blocks.qkv")
    assert is_layer_stack("opt.mu.blocks.qkv")
    assert not is_layer_stack("params.unblocks.x")


def test_arrays_may_be_donated_and_overwritten_when_save_returns(tmp_path: Path) -> None:
    """The train step donates its state at once, over and over, while the save is under way."""
    shape = (4, 512, 512)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"params.blocks.w{i}": jnp.full(shape, float(i)) for i in range(4)}
    state = bump(state)
    pointers = {x.unsafe_buffer_pointer() for x in state.values()}
    expected = {name: np.array(x, copy=True) for name, x in state.items()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        state = bump(state)
        # The step really wrote into the buffers that were saved: save keeps no view of them.
        assert {x.unsafe_buffer_pointer() for x in state.values()} == pointers
        for _ in range(20):
            state = bump(state)
    restored = restore(step_path(tmp_path, 1), abstract_of(state))
    for name, value in expected.items():
        assert np.array_equal(np.asarray(restored[name]), value)


# What is refused.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params.embed": jax.ShapeDtypeStruct((17, 8), jnp.bfloat16)}, "[17,8]"),
        ({"params.embed": jax.ShapeDtypeStruct((16, 8), jnp.float32)}, "float32[16,8]"),
        ({"params.embed": None}, "absent in this model"),
        ({"params.aaa": jax.ShapeDtypeStruct((2,), jnp.int32)}, "params.aaa is absent in it"),
    ],
)
def test_the_first_difference_is_named(saved: Path, change: dict, words: str) -> None:
    abstract = {n: a for n, a in {**ABSTRACT, **change}.items() if a is not None}
    # A later one differs too: it is not the one that is named.
    abstract["step"] = jax.ShapeDtypeStruct((3,), jnp.uint32)
    with pytest.raises(BadInputError) as caught:
        restore(step_path(saved, 20), abstract)
    message = str(caught.value)
    name = next(iter(change))
    assert f"array {name} is" in message
    assert words in message
    assert "step is" not in message
    assert "\n" not in message
    if change[name] is not None and name in ABSTRACT:
        assert "bfloat16[16,8] in it" in message


def test_a_newer_version_is_refused(copy: Path) -> None:
    path = step_path(copy, 20)
    content = json.loads((path / "manifest.json").read_bytes())
    del content["sha256"]
    content["version"] = FORMAT_VERSION + 1
    (path / "manifest.json").write_bytes(_seal(content))
    for use in (lambda: restore(path, ABSTRACT), lambda: verify(path), lambda: latest_good(copy)):
        with pytest.raises(BadInputError, match=r"format version 3 is newer .* reads, 2; install"):
            use()


def test_no_checkpoint_there(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "none") is None
    assert latest_good(tmp_path / "none") is None
    assert restore_latest(tmp_path, ABSTRACT) is None
    for use in (verify, read_manifest, read_files):
        with pytest.raises(UsageError, match=r"no checkpoint at .*step_N"):
            use(tmp_path / "step_5")


@pytest.mark.parametrize("name", ["manifest.json", "arrays", "../x", ".hidden", ""])
def test_bad_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        Checkpointer(tmp_path).save(1, make_state(1), {name: b""})


def test_bad_arrays(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="array name 'a/b'"):
        checkpointer.save(1, {"a/b": jnp.ones(1)})
    with pytest.raises(ValueError, match="without an element"):
        checkpointer.save(1, {"a": jnp.ones((0, 2))})
    with pytest.raises(ValueError, match="without arrays"):
        checkpointer.save(1, {})
    with pytest.raises(UsageError, match="--keep 0"):
        Checkpointer(tmp_path, keep=0)


# Damage.


def files_of(step_folder: Path) -> list[str]:
    return sorted(p.relative_to(step_folder).as_posix() for p in step_folder.rglob("*"))


def kinds(saved_step: Path) -> list[str]:
    """Every file of a step: each is a kind of its own to whoever reads it."""
    return [n for n in files_of(saved_step) if (saved_step / n).is_file()]


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flip":
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif how == "truncate":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "grow":
        path.write_bytes(data + b"\0")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "grow", "delete"])
def test_every_damaged_file_is_named_and_passed_over(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    names = kinds(step_path(saved, 20))
    assert len(names) >= 8
    for i, name in enumerate(names):
        folder = Path(shutil.copytree(saved, tmp_path / str(i)))
        path = step_path(folder, 20)
        if how in ("flip", "truncate", "empty") and not (path / name).stat().st_size:
            continue
        spoil(path / name, how)
        assert [d.file for d in verify(path)] == [name]
        assert verify(path)[0].kind == ("missing" if how == "delete" else "changed")
        caplog.clear()
        found = restore_latest(folder, ABSTRACT)
        assert found is not None
        assert found.step == 10
        assert found.files == FILES
        assert_same(found.arrays, make_state(10))
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert name in warnings[0]
        with pytest.raises((BadInputError, UsageError), match=name.rsplit("/")[-1]):
            restore(path, ABSTRACT)


def test_every_byte_of_the_manifest_counts(copy: Path) -> None:
    path = step_path(copy, 20) / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 13):
        for flip in (1, 32):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            assert [d.file for d in verify(path.parent)] == ["manifest.json"], at


def test_damaged_small_file_is_not_handed_out(copy: Path) -> None:
    path = step_path(copy, 20)
    (path / "config.json").write_bytes(b'{"preset": "tesT"}')
    with pytest.raises(BadInputError, match=r"config\.json is changed"):
        read_files(path)


def test_all_damaged_is_an_error_and_not_a_fresh_start(copy: Path) -> None:
    for step in (10, 20):
        spoil(step_path(copy, step) / "config.json", "flip")
    with pytest.raises(BadInputError, match=r"every checkpoint in .*\(step_20: config\.json"):
        restore_latest(copy, ABSTRACT)


# Retention.


@given(
    steps=st.sets(st.integers(0, 100), min_size=1),
    keep=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
)
def test_which_steps_are_kept(steps: set[int], keep: int, keep_every: int | None) -> None:
    kept = steps_kept(steps, keep=keep, keep_every=keep_every)
    dropped = steps - kept
    assert max(steps) in kept
    assert len(kept) >= min(keep, len(steps))
    for step in dropped:
        assert sum(other > step for other in steps) >= keep
        assert keep_every is None or step % keep_every


def test_retention_on_disk(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2, keep_every=20) as checkpointer:
        for step in range(5, 55, 5):
            checkpointer.save(step, make_state(step))
        checkpointer.wait()
        assert checkpointer.steps() == [20, 40, 45, 50]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s}" for s in (20, 40, 45, 50)]


def test_a_step_can_be_saved_again(copy: Path) -> None:
    spoil(step_path(copy, 20) / "manifest.json", "delete")
    assert complete_steps(copy) == [10]
    with Checkpointer(copy) as checkpointer:
        checkpointer.save(20, make_state(7))
    assert_same(restore(step_path(copy, 20), ABSTRACT), make_state(7))


def test_a_step_that_is_being_read_is_not_deleted(copy: Path) -> None:
    """Another process holds the lock that `restore` takes: that one is stepped around."""
    with open(step_path(copy, 10) / "manifest.json", "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        save_steps(copy, 30, keep=1)
        assert complete_steps(copy) == [10, 30]
    save_steps(copy, 40, keep=1)
    assert complete_steps(copy) == [40]


def test_restore_holds_that_lock(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(path: str, abstract: dict) -> dict[str, jax.Array]:
        save_steps(copy, 30, keep=1)
        seen.extend(complete_steps(copy))
        return make_state(10)

    monkeypatch.setattr("meshlm.checkpoint.restoring.ocp.load", load)
    restore(step_path(copy, 10), ABSTRACT)
    assert seen == [10, 30]


def test_leftovers(copy: Path) -> None:
    for name in (".saving-step_30.1", ".deleted-step_5"):
        shutil.copytree(step_path(copy, 10), copy / name)
    step_path(copy, 20).rename(copy / ".replaced-step_20")
    (copy / "notes.txt").write_text("not ours")
    clean_leftovers(copy)
    assert sorted(p.name for p in copy.iterdir()) == ["notes.txt", "step_10", "step_20"]
    assert verify(step_path(copy, 20)) == []


def test_leftovers_that_are_links_lose_their_name_alone(copy: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(step_path(copy, 10), tmp_path / "elsewhere"))
    (copy / ".saving-step_30.1").symlink_to(elsewhere)
    clean_leftovers(copy)
    assert sorted(p.name for p in copy.iterdir()) == ["step_10", "step_20"]
    assert verify(elsewhere) == []


# Failures while saving.


def test_a_failed_commit_is_reported_once_and_later_saves_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1))
    checkpointer.wait()
    monkeypatch.setenv("MESHLM_FAILPOINT", "before-manifest:error")
    checkpointer.save(2, make_state(2))
    while checkpointer.last_error is None:
        time.sleep(0.01)
    monkeypatch.delenv("MESHLM_FAILPOINT")
    assert checkpointer.steps() == [1]
    with pytest.raises(MeshLMError, match=r"checkpoint of step 2 was not saved: .*Errno 28"):
        checkpointer.save(3, make_state(3))  # which begins all the same
    checkpointer.wait()
    assert checkpointer.steps() == [1, 3]
    assert checkpointer.last_error is None
    assert_same(restore(step_path(tmp_path, 3), ABSTRACT), make_state(3))


@pytest.mark.parametrize(
    "name", ["before-arrays", "arrays-written", "before-manifest", "before-rename"]
)
def test_an_error_at_every_point_leaves_the_old_steps(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MESHLM_FAILPOINT", f"{name}:error")
    checkpointer = Checkpointer(copy)
    with pytest.raises(MeshLMError, match=f"step 30 was not saved.*{name}"):  # noqa: PT012
        checkpointer.save(30, make_state(30))  # raises for the first point
        checkpointer.wait()  # and this for the others
    assert "step 30" in str(checkpointer.last_error)
    assert sorted(p.name for p in copy.iterdir()) == ["step_10", "step_20"]
    monkeypatch.delenv("MESHLM_FAILPOINT")
    checkpointer.save(30, make_state(30))
    checkpointer.close()
    assert checkpointer.last_error is None
    assert complete_steps(copy) == [10, 20, 30]


def test_an_error_inside_orbax(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def result(self) -> None:
            raise RuntimeError("lost\nthe disk")

    with monkeypatch.context() as patch:
        patch.setattr(saving.ocp, "save_async", lambda *_: Broken())
        checkpointer = Checkpointer(copy)
        checkpointer.save(30, make_state(30))
        with pytest.raises(MeshLMError, match="not saved: lost the disk; older ones are intact"):
            checkpointer.wait()
    checkpointer.wait()  # told once
    assert complete_steps(copy) == [10, 20]


@pytest.mark.parametrize("again", [None, 30, 40])
def test_a_save_that_was_given_up_stays_so(
    copy: Path, monkeypatch: pytest.MonkeyPatch, again: int | None
) -> None:
    """Orbax may return from it hours later, beside a newer save of the same step or another."""
    late = threading.Event()

    class Late:
        def __init__(self, real) -> None:
            self.real = real

        def result(self) -> None:
            self.real.result()
            late.wait(60)

    save = saving.ocp.save_async
    checkpointer = Checkpointer(copy, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(saving.ocp, "save_async", lambda *a: Late(save(*a)))
        patch.setattr(saving, "heard", lambda _: "the disk is full")
        patch.setattr(saving, "_LOOK_S", 0.01)
        patch.setattr(saving, "_GRACE_S", 0.01)
        checkpointer.save(30, make_state(30))
        thread = checkpointer._thread
        assert thread is not None
        with pytest.raises(MeshLMError, match="in another process, the disk is full"):
            checkpointer.wait()
    if again is not None:
        with monkeypatch.context() as patch:  # under way when the first one returns
            patch.setattr(saving, "publish", lambda *a: (thread.join(60), publish(*a)))
            checkpointer.save(again, make_state(again))
            late.set()
            checkpointer.wait()
        assert complete_steps(copy) == [again]
        verify(step_path(copy, again))
    else:
        late.set()
        thread.join(60)
        assert complete_steps(copy) == [10, 20]
        assert checkpointer.last_error is not None
    assert not thread.is_alive()
    assert [p.name for p in copy.iterdir() if p.name.startswith(".")] == []


def test_leaving_the_block_reports_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MESHLM_FAILPOINT", "before-rename:error")
    with pytest.raises(MeshLMError, match="step 1 was not"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))


def run_python(
    code: str, *arguments: object, timeout_s: float = 120
) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


FULL_DISK = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from meshlm.checkpoint import Checkpointer, complete_steps, verify, step_path
from meshlm.core.errors import MeshLMError
folder = Path(sys.argv[1])
checkpointer = Checkpointer(folder)
small = {"params.blocks.w": jnp.ones((2, 64, 64))}
checkpointer.save(1, small)
checkpointer.wait()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, hard))
checkpointer.save(2, {"params.blocks.w": jnp.ones((2, 512, 512))})
try:
    checkpointer.wait()
except MeshLMError as error:
    print("error:", error)
print("after:", sorted(p.name for p in folder.iterdir()), verify(step_path(folder, 1)))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpointer.save(3, small)
checkpointer.close()
print("steps:", complete_steps(folder), verify(step_path(folder, 3)))
"""


def test_a_full_disk_costs_one_step_only(tmp_path: Path) -> None:
    done = run_python(FULL_DISK, tmp_path)
    assert done.returncode == 0, done.stderr
    error, after, steps = done.stdout.splitlines()
    assert error.startswith("error: checkpoint of step 2 was not saved:")
    assert after == "after: ['step_1'] []"
    assert steps == "steps: [1, 3] []"


# kill -9. One process imports everything and forks a fresh saver for each kill.

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from orbax.checkpoint import v1 as ocp
from meshlm.checkpoint import Checkpointer, latest_good, step_of

def state(step):
    return {"params.blocks.w": jnp.full((4, 512, 256), step, jnp.float32),
            "params.embed": jnp.full((512, 64), step, jnp.bfloat16), "step": jnp.uint32(step)}

def saver(folder, begun, point):
    latest = latest_good(folder)
    first = step_of(latest) if latest else 0
    checkpointer = Checkpointer(folder, keep=2)
    for step in range(first + 1, 10**6):
        checkpointer.save(step, state(step), {"config.json": b"{}"})
        if point:
            checkpointer.wait()
            os.environ["MESHLM_FAILPOINT"] = point + ":kill"
        os.write(begun, b".")

for case in sys.argv[2:]:
    folder, point = Path(sys.argv[1]) / case.partition("=")[0], case.partition("=")[2]
    for kill in range(1 if point else 3):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                saver(folder, write, point)
            finally:
                os._exit(9)
        os.close(write)
        if not point:
            os.read(read, 1)
            time.sleep(random.Random(case + str(kill)).uniform(0.0, 0.6))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (case, kill, status)
        os.close(read)
"""


POINTS = ["before-arrays", "arrays-written", "before-manifest", "before-rename", "after-rename"]


def kill_state(step: int) -> dict[str, jax.Array]:
    return {
        "params.blocks.w": jnp.full((4, 512, 256), step, jnp.float32),
        "params.embed": jnp.full((512, 64), step, jnp.bfloat16),
        "step": jnp.uint32(step),
    }


def check_after_kill(folder: Path) -> None:
    """Every listed step is whole and right, and the next save leaves no trace of the kill."""
    steps = complete_steps(folder)
    if folder.name in POINTS:
        assert steps == ([1, 2] if folder.name == "after-rename" else [1])
    for step in steps:
        assert verify(step_path(folder, step)) == []
        assert_same(restore(step_path(folder, step), abstract_of(kill_state(0))), kill_state(step))
    latest = steps[-1] if steps else 0
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(latest + 1, kill_state(latest + 1))
    assert [p.name for p in folder.iterdir()] == [f"step_{latest + 1}"]


def run_kills(tmp_path: Path, cases: list[str]) -> None:
    done = run_python(KILLS, tmp_path, *cases, timeout_s=590)
    assert done.returncode == 0, done.stderr
    for case in cases:
        check_after_kill(tmp_path / case.partition("=")[0])


def test_kill_at_random_moments_and_at_every_named_point(tmp_path: Path) -> None:
    run_kills(tmp_path, ["random", *(f"{point}={point}" for point in POINTS)])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kill_at_many_random_moments(tmp_path: Path) -> None:
    run_kills(tmp_path, [f"seed{seed}" for seed in range(20)])


# Several processes.

TWO_PROCESSES = """
import os, sys
from pathlib import Path
rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from meshlm.checkpoint import Checkpointer, restore, step_path, verify
from meshlm.core.errors import MeshLMError
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))

def state(step):
    def put(shape, dtype, spec):
        full = np.full(shape, step, dtype)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda i: full[i])
    return {"params.blocks.w": put((3, 8, 16), np.float32, P(None, "data")),
            "params.head": put((5,), np.float32, P()), "step": put((), np.uint32, P())}

checkpointer = Checkpointer(folder, keep=2)
for step in (1, 2, 3):
    checkpointer.save(step, state(step), {"config.json": b"{}"})
checkpointer.wait()
assert checkpointer.steps() == [2, 3]
assert verify(step_path(folder, 3)) == []
abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for n, a in state(0).items()}
for array in restore(step_path(folder, 3), abstract).values():
    assert all((np.asarray(shard.data) == 3).all() for shard in array.addressable_shards)
os.environ["MESHLM_FAILPOINT"] = "before-manifest:error"
checkpointer.save(4, state(4))
try:
    checkpointer.wait()
    raise AssertionError("the failure of process 0 was not seen")
except MeshLMError:
    pass
del os.environ["MESHLM_FAILPOINT"]
checkpointer.save(5, state(5))
checkpointer.close()
assert checkpointer.steps() == [3, 5]
print("good")
"""


@pytest.mark.long
def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(port), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            out, err = process.communicate(timeout=120)
            assert out.splitlines()[-1:] == ["good"], err
    finally:
        for process in running:
            process.kill()


# Disk.


@pytest.mark.parametrize("shape", [(1, 1), (64, 100, 100), (2, 1024, 1024)])
def test_estimate_is_an_upper_bound_and_near(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = {f"params.blocks.w{i}": jnp.ones(shape) for i in range(4)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    taken = sum(p.stat().st_size for p in step_path(tmp_path, 1).rglob("*") if p.is_file())
    estimate = estimate_bytes(abstract_of(state))
    assert taken <= estimate <= 1.02 * taken + 100_000


def test_too_little_disk_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abstract = {"w": jax.ShapeDtypeStruct((250_000_000,), jnp.float32)}  # 1.01 GB with its index
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4_100_000_000))
    folder = tmp_path / "run" / "checkpoints"
    check_free_disk(folder, abstract, range(10, 1000, 10), keep=3, keep_every=None)
    with pytest.raises(UsageError, match=r"5 checkpoints at once: 5\.05 GB .* 4\.10 GB are free"):
        check_free_disk(folder, abstract, range(10, 1000, 10), keep=4, keep_every=None)
    with pytest.raises(UsageError, match=r"13 checkpoints at once"):
        check_free_disk(folder, abstract, range(10, 1000, 10), keep=3, keep_every=100)
    # Two saves never need more than two.
    check_free_disk(folder, abstract, [10, 20], keep=100, keep_every=1)


def test_checkpoints_already_there_count(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(copy)
    free = estimate_bytes(ABSTRACT) + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    check_free_disk(copy, ABSTRACT, [30, 40], keep=2, keep_every=None)
    with pytest.raises(UsageError, match="4 checkpoints at once"):
        check_free_disk(copy, ABSTRACT, [30, 40], keep=4, keep_every=None)
