"""What paths stand for: odd names, links, and the bookkeeping of other programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.core.errors import UsageError
from meshlm.data.inputs import find_inputs
from meshlm.data.names import from_json_name, printable, to_json_name


def find(*paths: Path | str):
    return find_inputs([str(p) for p in paths], exclude=Path("/none"))


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def relative(folder: Path, found) -> list[str]:
    return [os.path.relpath(f.path, folder) for f in found]


def test_links_in_circles_and_to_nowhere_are_named(tmp_path):
    make(tmp_path, "in/a.txt", "in/b/c.txt")
    (tmp_path / "in/self").symlink_to("self")
    (tmp_path / "in/ping").symlink_to("pong")
    (tmp_path / "in/pong").symlink_to("ping")
    (tmp_path / "in/gone").symlink_to("nowhere")
    (tmp_path / "in/b/up").symlink_to("..")
    os.mkfifo(tmp_path / "in/pipe")
    for paths in ([tmp_path / "in"], [tmp_path / "in", tmp_path / "in"]):
        found = find(*paths)
        assert relative(tmp_path, found.files) == ["in/a.txt", "in/b/c.txt"]
        assert {Path(o.path).name: o.reason for o in found.left_out} == {
            "self": "a symbolic link in a circle",
            "ping": "a symbolic link in a circle",
            "pong": "a symbolic link in a circle",
            "gone": "a symbolic link to nowhere",
            "up": "a symbolic link to a folder that it is in",
            "pipe": "not a regular file",
        }
    by_pattern = find(tmp_path / "in/*")
    assert "gone" in {Path(o.path).name for o in by_pattern.left_out}
    for name, reason in [("self", "in a circle"), ("gone", "to nowhere")]:
        with pytest.raises(UsageError, match=rf"{name}: cannot read it \(a symbolic link {reason}"):
            find(tmp_path / "in" / name)


@pytest.fixture
def deep(tmp_path):
    """A file below more folders than Python recurses; pytest itself could not remove them."""
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("end.txt").write_text("x")
        yield tmp_path
        os.remove("end.txt")
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)


def test_deep_folders(deep):
    (file,) = find(deep).files
    assert file.path.endswith("d/end.txt")


def test_long_names(tmp_path):
    (tmp_path / ("n" * 255)).write_text("x")
    assert len(find(tmp_path).files) == 1
    for path in ("x" * 300, "y" * 5000, "a\0b"):
        with pytest.raises(UsageError, match="cannot read it"):
            find(path)


@pytest.mark.parametrize("mark", ["_SUCCESS", "_committed_42", "_delta_log/0.json", "x.parquet"])
def test_bookkeeping_of_spark_and_delta(tmp_path, mark):
    data = ["lang=en/part-00000.json", "lang=en/_committed_1", "_lang=de/part-00000.json"]
    make(tmp_path, *data, mark, "_started_7", "_temporary/0/part-00001.json", "__init__.py")
    found = find(tmp_path)
    expected = {data[0], data[2], "__init__.py", "x.parquet"} & {*data, "__init__.py", mark}
    assert set(relative(tmp_path, found.files)) == expected
    left_out = set(relative(tmp_path, found.left_out))
    assert left_out == {data[1], "_started_7", "_temporary", mark.split("/")[0]} - expected
    by_pattern = find(f"{tmp_path}/**/*.json")
    assert set(relative(tmp_path, by_pattern.files)) == {data[0], data[2]}


def test_underscores_of_source_code_are_texts(tmp_path):
    names = ["_private.py", "_config.yml", "_posts/a.md", "pkg/__init__.py"]
    assert relative(tmp_path, find(make(tmp_path, *names)).files) == sorted(names)


def test_token_stores_are_left_out_whole(tmp_path):
    make(tmp_path, "a.txt", *(f"s/{n}" for n in ("manifest.json", "tokenizer.json")))
    make(tmp_path, "s/train.tokens.bin", "s/val.tokens.bin")
    found = find(tmp_path)
    assert relative(tmp_path, found.files) == ["a.txt"]
    assert [(o.path, o.reason) for o in found.left_out] == [
        (str(tmp_path / "s"), "a token store of MeshLM")
    ]


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.txt")
    (tmp_path / name).write_text("x")
    for given_path in (tmp_path, tmp_path / name, f"{tmp_path}/*.txt"):
        (file,) = find(given_path).files
        assert os.fsencode(file.path).endswith(b"/caf\xe9\n.txt")


@given(st.one_of(st.binary(), st.text("\\x0123456789abcdefé\n").map(os.fsencode)))
def test_json_names_round_trip(data):
    name = os.fsdecode(data)
    written = to_json_name(name)
    assert from_json_name(written.encode().decode()) == name
    assert printable(name).isprintable()


def test_json_names_of_usual_names_are_these_names():
    for name in ("a.txt", "Bäume/漢字.jsonl", "with space\\and.txt", "\\x", "\\xg0"):
        assert to_json_name(name) == name
    assert to_json_name(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[1m")) == "caf\\xe9\\n\\x1b[1m"


def test_nothing_to_read_is_said_with_what_is_left_out(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"no file found there but .*pipe: not a regular file"):
        find(tmp_path)


def test_a_pipe_in_the_place_of_a_datasets_state_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    (tmp_path / "a.txt").write_text("words")
    assert relative(tmp_path, find(tmp_path).files) == ["a.txt"]
