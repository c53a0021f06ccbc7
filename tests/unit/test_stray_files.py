"""Other files in a checkpoint are no damage, and nothing is deleted because it was suspected."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.checkpoint import (
    Checkpointer,
    LayerReader,
    LayerWriter,
    check_free_disk,
    clean_leftovers,
    complete_steps,
    estimate_bytes,
    latest_good,
    manifest,
    read_manifest,
    restore,
    restore_latest,
    saving,
    step_path,
    steps_aside,
    stray_files,
    verify,
)
from meshlm.checkpoint.disk import is_superseded, steps_kept
from meshlm.checkpoint.manifest import ArrayInfo
from meshlm.cli import verify as verify_command
from meshlm.core.errors import BadInputError, UsageError

FILES = {"config.json": b"{}"}


def state_of(step: int) -> dict[str, jax.Array]:
    return {
        "params.blocks.w": jnp.full((2, 4, 8), step, jnp.float32),
        "params.embed": jnp.full((16, 8), step, jnp.bfloat16),
        "step": jnp.int32(step),
    }


ABSTRACT = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in state_of(0).items()}


def save(folder: Path, *steps: int, keep: int = 100, **options) -> None:
    with Checkpointer(folder, keep=keep, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, state_of(step), FILES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 10, 20)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def put(step: Path, name: str, data: bytes = b"\0\0junk") -> None:
    (step / name).parent.mkdir(parents=True, exist_ok=True)
    (step / name).write_bytes(data)


def spoil(step: Path) -> None:
    (step / "config.json").write_bytes(b"[]")


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def assert_is_state(arrays, step: int) -> None:
    for name, value in state_of(step).items():
        assert np.asarray(arrays[name]).tobytes() == np.asarray(value).tobytes(), name


# What file managers, editors, notebooks, copying tools and people leave, at every depth.
STRAYS = [
    ".DS_Store",
    "._manifest.json",
    "Thumbs.db",
    "desktop.ini",
    "config.json~",
    "config.json.bak",
    "#config.json#",
    ".config.json.swp",
    "notes.txt",
    "generation_config.json",
    ".ipynb_checkpoints/config-checkpoint.json",
    ".git/HEAD",
    "arrays/.DS_Store",
    "arrays/._state",
    "arrays/.nfs000000000001",
    "arrays/model.safetensors",
    "arrays/zarr.json",
    "arrays/.zarray",
    "arrays/manifest.ocdbt",
    "arrays/metadata",
    "arrays/step_20.orbax-checkpoint-tmp-1/x",
    "arrays/state (copy)/manifest.ocdbt",
    "arrays/pytree/_METADATA",
    "arrays/default/_METADATA",
    "arrays/state/.DS_Store",
    "arrays/state/._manifest.ocdbt",
    "arrays/state/manifest.ocdbt.bak",
    "arrays/state/manifest (1).ocdbt",
    "arrays/state/manifest.ocdbt.__lock",
    "arrays/state/zarr.json",
    "arrays/state/params.embed/zarr.json",
    "arrays/state/params.embed/.zarray",
    "arrays/state/params.embed/c/0/0",
    "arrays/state/d/.DS_Store",
    "arrays/state/d/Thumbs.db",
    "arrays/state/ocdbt.process_0/d/notes.txt",
]


def test_other_files_change_nothing_and_are_told_of(
    copy: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read with all of them there: the numbers are those of the checkpoint, bit for bit."""
    step = step_path(copy, 20)
    for name in STRAYS:
        put(step, name)
    os.mkfifo(step / "pipe")
    (step / "nowhere").symlink_to(copy / "not-there")
    (step / "circle").symlink_to("circle")
    (step / "linked").symlink_to(copy, target_is_directory=True)
    (step / "empty").mkdir()
    everything = sorted([*STRAYS, "pipe", "nowhere", "circle", "linked"])
    assert verify(step) == []
    assert stray_files(step) == everything
    found = restore_latest(copy, ABSTRACT)
    assert found is not None
    assert found.step == 20
    assert found.files == FILES
    assert_is_state(found.arrays, 20)
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told.startswith(f"checkpoint {step} is good; not part of it, and not read: #config")
    assert told.endswith(f" and {len(everything) - 3} more")
    reader = LayerReader(step)
    for name, value in state_of(20).items():
        assert reader.read(name).tobytes() == np.asarray(value).tobytes(), name
    caplog.clear()
    verify_command.run(verify_command.Config(path=copy))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{step_path(copy, 10)}: good"
    assert second.startswith(f"{step}: good (not part of it, and not read: ")


# Names that Orbax or TensorStore give a meaning: there a file could be read.
READ = [
    "arrays/_CHECKPOINT_DELETION",
    "arrays/_METADATA",
    "arrays/state/_sharding",
    "arrays/state/array_metadatas/process_0",
    "arrays/state/manifest.0000000000000001",
    "arrays/state/d/0123456789abcdef0123456789abcdef",
    "arrays/state/ocdbt.process_1/manifest.ocdbt",
    "arrays/state/ocdbt.process_1/d/0123456789abcdef0123456789abcdef",
]


def test_other_files_that_would_be_read_are_damage(copy: Path) -> None:
    step = step_path(copy, 20)
    for name in READ:
        put(step, name)
        assert [str(d) for d in verify(step)] == [f"{name} is unexpected"]
        (step / name).unlink()
    (step / "arrays/state/array_metadatas").rmdir()
    (step / "arrays/state/array_metadatas").symlink_to(copy)
    assert [str(d) for d in verify(step)] == ["arrays/state/array_metadatas is unexpected"]


def test_why_such_names_are_damage(copy: Path) -> None:
    """Orbax does not read the checkpoint then; with any other name it does, as tried above."""
    step = step_path(copy, 20)
    put(step, "arrays/_CHECKPOINT_DELETION")
    with pytest.raises(Exception, match="deletion record"):
        restore(step, ABSTRACT, check=False)


def test_a_file_of_ours_that_is_no_file_is_damage(copy: Path) -> None:
    step = step_path(copy, 20)
    traps = {
        "changed": [lambda p: p.mkdir(), lambda p: os.mkfifo(p), lambda p: p.symlink_to(p.name)],
        "missing": [lambda p: p.symlink_to("not-there")],
    }
    for name in ("config.json", "arrays/state/_METADATA", "manifest.json"):
        path = step / name
        path.rename(path.with_name("kept"))
        for kind, makes in traps.items():
            for make in makes:
                make(path)
                assert [(d.file, d.kind) for d in verify(step)] == [(name, kind)]
                (os.rmdir if path.is_dir() else os.unlink)(path)
        path.with_name("kept").rename(path)
    assert verify(step) == []


def test_what_cannot_be_read_for_the_moment_is_no_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that fails: no older step is taken, and nothing is moved."""

    def fail(path, *_: object, **__: object):
        raise OSError(errno.EIO, "Input/output error", str(path))

    for target, name in (
        (manifest, "open_plain"),
        (manifest, "read"),
        (manifest.os, "walk"),
        (os, "scandir"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match="Input/output"):
                latest_good(copy)
    found = latest_good(copy)
    assert found == step_path(copy, 20)
    assert names(copy) == ["step_10", "step_20"]


def test_a_folder_that_cannot_be_listed_is_not_empty(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.walk` would leave out what it cannot list, and files would seem to be missing."""
    scandir = os.scandir

    def fail_below(path):
        if str(path).endswith("/d"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail_below)
    with pytest.raises(OSError, match="Stale"):
        verify(step_path(copy, 20))


def test_what_appears_while_a_step_is_saved_is_none_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file manager that looks into the hidden folder in that second, say."""
    hash_files = saving.hash_files

    def later(folder: Path, small_files):
        for name in (".DS_Store", "arrays/.DS_Store", "arrays/state/d/._x", "notes.txt"):
            put(folder, name)
        return hash_files(folder, small_files)

    monkeypatch.setattr(saving, "hash_files", later)
    save(tmp_path, 1)
    writer = LayerWriter(tmp_path / "layers", {"a": ArrayInfo(shape=(2,), dtype="float32")})
    writer.write("a", np.ones(2, np.float32))
    writer.seal(0, FILES)
    for step in (step_path(tmp_path, 1), tmp_path / "layers"):
        assert not any(n[:1] == "_" or n[:1] == "." for n in read_manifest(step).files)
        assert len(stray_files(step)) == 4
        for name in stray_files(step):
            (step / name).unlink()
        assert verify(step) == []


# What was passed over.


def test_a_step_that_was_passed_over_is_set_aside_whole(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 20 is suspected, the run goes on from 10: 20 stays until two newer ones are there."""
    spoil(step_path(copy, 20))
    before = content(step_path(copy, 20))
    with Checkpointer(copy, keep=2, resumed=10) as checkpointer:
        checkpointer.save(15, state_of(15), FILES)
        checkpointer.wait()
        aside = copy / "aside" / "step_20"
        assert names(copy) == ["aside", "step_10", "step_15"]
        assert content(aside) == before
        (told,) = [r.getMessage() for r in caplog.records]
        assert f"step 20 was passed over and is now {aside}: delete it" in told
        assert "--keep (2) newer ones" in told
        for step, expected in (
            (20, ["aside", "step_15", "step_20"]),
            (25, ["aside", "step_20", "step_25"]),
        ):
            checkpointer.save(step, state_of(step), FILES)
            checkpointer.wait()
            assert names(copy) == expected
            assert content(aside) == before
        checkpointer.save(30, state_of(30), FILES)
        checkpointer.wait()
        assert names(copy) == ["step_25", "step_30"]
    found = restore_latest(copy, ABSTRACT)
    assert found is not None
    assert_is_state(found.arrays, 30)


def test_nobody_looks_for_steps_aside(copy: Path) -> None:
    spoil(step_path(copy, 20))
    save(copy, 15, resumed=10)
    assert complete_steps(copy) == [10, 15]
    assert latest_good(copy) == step_path(copy, 15)
    assert steps_aside(copy) == [(20, copy / "aside" / "step_20")]
    with pytest.raises(BadInputError, match=r"config\.json is changed"):
        restore(copy / "aside" / "step_20", ABSTRACT)


def test_the_same_step_may_be_passed_over_again(copy: Path) -> None:
    for _ in range(3):
        spoil(step_path(copy, 20))
        save(copy, 20, resumed=10)
    assert names(copy / "aside") == ["step_20", "step_20.1", "step_20.2"]
    assert verify(step_path(copy, 20)) == []
    save(copy, 21, 22, keep=2, resumed=20)
    assert names(copy) == ["step_21", "step_22"]


def test_steps_between_are_set_aside_and_push_nothing_out(copy: Path) -> None:
    """With or without a manifest: the good step 10 is one of the two that are kept."""
    shutil.copytree(step_path(copy, 20), step_path(copy, 12))
    (step_path(copy, 12) / "manifest.json").unlink()
    spoil(step_path(copy, 20))
    save(copy, 15, keep=2, resumed=10)
    assert names(copy) == ["aside", "step_10", "step_15"]
    assert names(copy / "aside") == ["step_12", "step_20"]


def test_without_a_word_on_where_it_goes_on(copy: Path) -> None:
    """Steps from the one saved on are set aside, the same one included."""
    save(copy, 20)
    assert names(copy) == ["aside", "step_10", "step_20"]
    save(copy, 5)
    assert names(copy) == ["aside", "step_5"]
    assert names(copy / "aside") == ["step_10", "step_20", "step_20.1"]


def test_a_step_of_its_own_is_replaced(copy: Path) -> None:
    save(copy, 30, 30, resumed=20)
    assert names(copy) == ["step_10", "step_20", "step_30"]


def test_a_failed_save_leaves_all_where_it_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(step_path(copy, 20))
    monkeypatch.setenv("MESHLM_FAILPOINT", "before-rename:error")
    with Checkpointer(copy, resumed=10) as checkpointer:
        checkpointer.save(15, state_of(15), FILES)
        with pytest.raises(Exception, match="was not saved"):
            checkpointer.wait()
    assert names(copy) == ["step_10", "step_20"]


def test_a_replaced_step_that_a_killed_process_left_is_set_aside(copy: Path) -> None:
    shutil.copytree(step_path(copy, 20), copy / ".replaced-step_20")
    clean_leftovers(copy)
    assert names(copy) == ["aside", "step_10", "step_20"]
    assert verify(copy / "aside" / "step_20") == []


def test_when_a_step_in_doubt_goes() -> None:
    assert not is_superseded(20, [10, 15, 20, 25], keep=2, keep_every=None)
    assert is_superseded(20, [15, 20, 25, 30], keep=2, keep_every=None)
    # A multiple of --keep-every is kept for ever, so its place is filled by the same step alone.
    assert not is_superseded(20, [25, 30, 35], keep=2, keep_every=10)
    assert is_superseded(20, [20, 25, 30, 35], keep=2, keep_every=10)
    assert is_superseded(21, [25, 30, 35], keep=2, keep_every=10)


@pytest.mark.parametrize("keep_every", [None, 4])
def test_a_step_in_doubt_stays_as_long_as_a_good_one(keep_every: int | None) -> None:
    """With the same retention, neither longer nor shorter, as long as there is no good one too."""
    kept = [1, 2, 3, 4]
    for step in range(5, 30):
        kept = sorted(steps_kept({*kept, step}, keep=3, keep_every=keep_every))
        for other in {*range(1, step + 1)} - {*kept}:
            would_be_kept = other in steps_kept({*kept, other}, keep=3, keep_every=keep_every)
            gone = is_superseded(other, kept, keep=3, keep_every=keep_every)
            assert gone == (not would_be_kept)


def test_steps_that_are_passed_over_count_in_the_planning(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep their bytes while the new ones come: three more are needed to keep three of 10."""
    usage = shutil.disk_usage(copy)
    one = estimate_bytes(ABSTRACT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * one))
    options = {"keep": 3, "keep_every": None, "resumed": 10}
    check_free_disk(copy, ABSTRACT, range(15, 100, 5), **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * one - 1))
    with pytest.raises(UsageError, match="4 checkpoints at once") as caught:
        check_free_disk(copy, ABSTRACT, range(15, 100, 5), **options)
    assert "aside" not in str(caught.value)
    spoil(step_path(copy, 20))
    save(copy, 15, resumed=10)
    with pytest.raises(UsageError, match="aside may be deleted"):
        check_free_disk(copy, ABSTRACT, range(20, 100, 5), keep=9, keep_every=None, resumed=15)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_circle(path: Path) -> None:
    path.symlink_to(path.name)


def make_file(path: Path) -> None:
    path.write_bytes(b"mine")


def make_link(path: Path) -> None:
    (path.parent.parent / "elsewhere/step_5").mkdir(parents=True)
    path.symlink_to("../elsewhere")


ODD = [make_dangling, make_circle, make_file, os.mkfifo, make_link]


@pytest.mark.parametrize("make", ODD)
def test_what_lies_at_a_step_s_name_is_set_aside_and_the_step_is_saved(copy, make):
    make(copy / "step_30")
    before = (copy / "step_30").lstat().st_ino
    save(copy, 30, keep=1, resumed=20)
    assert complete_steps(copy) == [30]
    assert not verify(copy / "step_30")
    assert (copy / "aside/step_30").lstat().st_ino == before
    assert not any(name.startswith(".") for name in names(copy))


@pytest.mark.parametrize("make", ODD)
def test_what_is_named_aside_and_is_no_folder_ends_no_save(copy, make):
    make(copy / "aside")
    before = (copy / "aside").lstat().st_ino
    assert steps_aside(copy) == []
    spoil(copy / "step_20")
    save(copy, 20, 30, resumed=10)
    assert complete_steps(copy) == [10, 20, 30]
    assert [step for step, _ in steps_aside(copy)] == [20]
    assert (copy / "aside.1").lstat().st_ino == before
    if make is make_link:
        assert names(copy.parent / "elsewhere") == ["step_5"]


def test_only_leftovers_of_saves_and_deletes_are_removed(copy):
    own = [".saving-step_30.1", ".deleted-step_5", ".deleted-step_5.2"]
    others = [".saving-notes", ".deleted-photos", ".saving-step_30.old", ".deleted-step_05"]
    for name in (*own, *others):
        put(copy / name, "file")
    clean_leftovers(copy)
    assert names(copy) == sorted([*others, "step_10", "step_20"])
