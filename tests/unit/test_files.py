"""Files are written under their own names only: no link, pipe or second name leads elsewhere."""

from __future__ import annotations

import ast
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from meshlm.core import files
from meshlm.core.errors import UsageError
from meshlm.data.journal import Appender, Plan, Totals, Workspace
from meshlm.data.prepare import PrepareConfig, prepare
from meshlm.data.store import Counts
from meshlm.formats.npz_writer import NpzWriter
from meshlm.formats.safetensors import TensorWriter
from meshlm.formats.tensor import TensorInfo
from meshlm.training import run_folder
from meshlm.training.lock import RunLock
from meshlm.training.metrics import MetricsLog
from meshlm.training.output import RunOutput
from meshlm.training.progress import TrainingProgress
from meshlm.training.report import write_report

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "meshlm"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of somebody's that must stay as it is."""
    path = tmp_path / "victim.txt"
    path.write_bytes(b"precious\n")
    yield path
    assert path.read_bytes() == b"precious\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("made-elsewhere"))


def loop(path: Path, victim: Path) -> None:
    path.symlink_to(path.name)


def hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path, victim: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may be 107 bytes long
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


TRAPS = [link, dangling, loop, hard_link, pipe]
WORDS = {
    link: "a symbolic link",
    dangling: "a symbolic link",
    loop: "a symbolic link",
    hard_link: "2 names",
    pipe: "a named pipe",
    unix_socket: "a socket",
}


@pytest.mark.parametrize("trap", [*TRAPS, unix_socket])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_plain_file_is_not_written_to(folder: Path, victim: Path, trap) -> None:
    path = folder / "name"
    trap(path, victim)
    for use in (files.append, files.update, lambda p: files.update(p, make=True)):
        with pytest.raises(UsageError, match=WORDS[trap]) as caught:
            use(path)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 2
    with pytest.raises(FileExistsError):
        files.create(path)
    with pytest.raises(FileExistsError):
        files.write_new(path, b"x")
    assert not victim.with_name("made-elsewhere").exists()


@pytest.mark.parametrize("trap", [link, dangling, loop, hard_link, pipe])
@pytest.mark.parametrize("name", ["config.json", "config.json.partial"])
def test_replacing_replaces_the_name_alone(folder: Path, victim: Path, trap, name: str) -> None:
    trap(folder / name, victim)
    files.replace(folder / "config.json", b"new")
    assert (folder / "config.json").read_bytes() == b"new"
    assert not (folder / "config.json").is_symlink()
    assert os.listdir(folder) == ["config.json"]
    assert not victim.with_name("made-elsewhere").exists()


def test_replacing_that_fails_keeps_the_old_content(folder: Path, monkeypatch) -> None:
    path = folder / "config.json"
    files.replace(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(folder) == ["config.json"]


def test_plain_files(folder: Path) -> None:
    path = folder / "name"
    with pytest.raises(FileNotFoundError):
        files.update(path)
    with files.append(path) as file:
        file.write(b"one\n")
    with files.append(path) as file:
        file.write(b"two\n")
    with files.update(path) as file:
        file.write(b"O")
    assert files.read(path) == b"One\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def test_folders_may_be_links(folder: Path) -> None:
    """Where a run lies is the user's choice; only the last name must be our own."""
    elsewhere = folder.with_name("elsewhere")
    elsewhere.symlink_to(folder)
    with RunLock(elsewhere):
        files.replace(elsewhere / "config.json", b"{}")
        with files.append(elsewhere / "metrics.jsonl") as file:
            file.write(b"{}\n")
    assert sorted(os.listdir(folder)) == [".lock", "config.json", "metrics.jsonl"]


def test_reading_does_not_wait_for_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "config.json")
    with pytest.raises(UsageError, match=r"config\.json is a named pipe"):
        run_folder.read_config(folder)
    (folder / "link").symlink_to(folder / "file")
    (folder / "file").write_bytes(b"x")
    assert files.read(folder / "link") == b"x"


@pytest.mark.parametrize("name", ["manifest.json", "unfinished/journal.jsonl"])
def test_a_store_in_the_making_does_not_wait_for_a_pipe(folder: Path, name: str) -> None:
    (folder / "text.txt").write_text("some text, and some more of it\n" * 20)
    out = folder / "store"
    (out / "unfinished").mkdir(parents=True)
    os.mkfifo(out / name)
    config = PrepareConfig(paths=(str(folder / "text.txt"),), out=str(out), val_fraction=0)
    with pytest.raises(UsageError, match=f"{name} is a named pipe"):
        prepare(config)


# Everything in a run's folder, and in the folder of a store in the making.


def lock(run: Path) -> None:
    with RunLock(run):
        pass


def metrics(run: Path) -> None:
    with MetricsLog(run, resume_step=None) as log:
        log.write(1, loss=1.0)


def progress(run: Path) -> None:
    with TrainingProgress(run, Console(quiet=True), start=0, total=1) as shown:
        shown.say("hello")


def incident(run: Path) -> None:
    run_folder.add_incident(run, 1, "stopped", "by hand")


def samples(run: Path) -> None:
    run_folder.write_samples(run, 1, [("a", "b")])


def growing_store(run: Path) -> None:
    totals = Totals(sources={0: {"train": Counts(), "val": Counts()}})
    Appender(run, totals, np.dtype("<u2")).close()


def journal(run: Path) -> None:
    growing_store(run)


WRITERS: list[tuple[Callable[[Path], object], str]] = [
    (lock, ".lock"),
    (metrics, "metrics.jsonl"),
    (progress, "log.txt"),
    (incident, "incidents.jsonl"),
    (growing_store, "train.tokens.bin"),
    (growing_store, "val.documents.bin"),
    (journal, "journal.jsonl"),
]


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_growing_files(folder: Path, victim: Path, trap, write, name: str) -> None:
    if name != "journal.jsonl":
        (folder / "journal.jsonl").write_bytes(b"{}\n")
    trap(folder / name, victim)
    with pytest.raises(UsageError, match=re.escape(name)):
        write(folder)
    assert not victim.with_name("made-elsewhere").exists()


@pytest.mark.parametrize("trap", [link, dangling, hard_link, pipe])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_report, "report.html"),
        (write_report, "report.html.partial"),
        (samples, "samples/step_1.json"),
        (samples, "samples/step_1.json.partial"),
        (metrics, "metrics.jsonl.partial"),
    ],
)
def test_replaced_files(folder: Path, victim: Path, trap, write, name: str) -> None:
    (folder / "samples").mkdir()
    # A torn line, so that the metrics are written anew.
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    trap(folder / name, victim)
    write(folder)
    whole = folder / name.removesuffix(".partial")
    assert not whole.is_symlink()
    assert whole.is_file()
    assert whole.stat().st_nlink == 1
    assert not (folder / name).exists() or name == whole.relative_to(folder).as_posix()


def test_a_view_that_is_a_link_is_told_of_and_training_goes_on(
    folder: Path, victim: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link(folder / "incidents.jsonl", victim)
    with RunOutput(folder, Console(quiet=True), start=0, total=1, begins=True) as output:
        output.incident(1, "stopped", "by hand")
        output.incident(2, "stopped", "again")
    (told,) = [r.getMessage() for r in caplog.records]
    assert "incidents.jsonl is a symbolic link" in told


def test_tensorboard_events_are_new_files(folder: Path, victim: Path, monkeypatch) -> None:
    monkeypatch.setattr("meshlm.training.metrics.time.time", lambda: 1_800_000_000.0)
    (folder / "tensorboard").mkdir()
    # What a stranger who guesses the second would put there; it counts as the first file of two.
    link(folder / "tensorboard" / "events.out.tfevents.1800000000.00001", victim)
    metrics(folder)
    assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == 1


def test_a_journal_that_is_a_link_is_replaced(folder: Path, victim: Path) -> None:
    with Workspace(folder) as workspace:
        workspace.begin(Plan(options={}, inputs=[]))
        link(workspace.path / "train.tokens.bin", victim)
        with pytest.raises(UsageError, match=r"train\.tokens\.bin is a symbolic link"):
            growing_store(workspace.path)


def test_weights_are_new_files(folder: Path, victim: Path) -> None:
    path = folder / "0.npz"
    link(path, victim)
    with pytest.raises(FileExistsError):
        NpzWriter(path)
    with pytest.raises(FileExistsError):
        TensorWriter(path, {"a": TensorInfo(shape=(1,), dtype=np.dtype("<f4"))}, {})


# Nobody else opens a file for writing.

_WRITING = re.compile(r"[rwaxbt+U]*[wax+][rwaxbt+U]*")
_METHODS = ("write_text", "write_bytes", "touch", "tofile", "FileHandler", "RotatingFileHandler")
_FUNCTIONS = re.compile(
    r"shutil\.(copy|copyfile|copy2|copytree|move)|np\.(save|savez|savez_compressed|savetxt|memmap)"
    r"|os\.(mkfifo|mknod|symlink|link|truncate|creat)|(zipfile|tarfile)\..*File"
)
# What is opened there is nobody's file, or is read.
_ALLOWED = {
    "formats/npz_writer.py": [
        "zipfile.ZipFile(self._target, 'w')",
        "self._file.open(name, 'w', force_zip64=True)",
    ],
    "core/standard_streams.py": ["os.open(os.devnull, os.O_RDWR)"],
    "planning/worker.py": ["os.fdopen(os.dup(1), 'w')"],
}


def writes(source: str) -> Iterator[str]:
    """Every call that could open a file for writing, as text."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        texts = [
            a.value
            for a in (*node.args, *(k.value for k in node.keywords))
            if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        opens = re.search(r"(^|[._])(open|fdopen)$", name) is not None
        in_a_mode = any(_WRITING.fullmatch(text) for text in texts)
        unknown_mode = name in ("open", "io.open") and not texts and len(node.args) > 1
        if (
            name == "os.open"
            or (opens and (in_a_mode or unknown_mode))
            or name.rsplit(".")[-1] in _METHODS
            or (_FUNCTIONS.fullmatch(name) and (name.startswith(("shutil", "os")) or in_a_mode))
            or re.fullmatch(r"np\.save\w*", name)
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_core_files_writes(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    if name == "core/files.py":
        return
    found = [call for call in writes(path.read_text()) if call not in _ALLOWED.get(name, [])]
    assert found == [], "use meshlm.core.files"


@pytest.mark.parametrize(
    "call",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, mode)",
        "path.open('r+b')",
        "path.open(mode='x')",
        "io.open(path, 'w')",
        "gzip.open(path, 'wb')",
        "os.open(path, os.O_WRONLY)",
        "os.fdopen(3, 'w')",
        "path.write_text('x')",
        "path.write_bytes(b'x')",
        "path.touch()",
        "logging.FileHandler(path)",
        "shutil.copyfile(a, b)",
        "np.save(path, x)",
        "array.tofile(path)",
        "zipfile.ZipFile(path, 'x')",
        "np.memmap(path, np.uint8, 'w+')",
    ],
)
def test_the_search_finds(call: str) -> None:
    assert list(writes(call)) == [call]


@pytest.mark.parametrize(
    "call", ["open(path, 'rb')", "open(path)", "path.open()", "TokenStore.open(path)", "f.write(x)"]
)
def test_the_search_passes(call: str) -> None:
    assert list(writes(call)) == []
