"""A weights file or a corpus that is cut between opening and reading is an error, and no SIGBUS."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest

import meshlm
from meshlm.core.errors import BadInputError, MeshLMError
from meshlm.data import columns
from meshlm.formats.content import FileContent, MemoryContent
from meshlm.formats.npz import NpzFile
from meshlm.formats.safetensors import open_tensors, to_bytes

ARRAY = np.arange(1 << 16, dtype=np.float32).reshape(256, 256)
CUT = r"it was cut while it was read: it had [\d,]+ bytes and has 4,096 now"


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def test_a_safetensors_file_that_is_cut_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(to_bytes({"a": ARRAY, "b": ARRAY}, {}))
    tensors = open_tensors(path)
    assert np.array_equal(tensors.read("a"), ARRAY)
    held = tensors.read("b")
    cut(path)
    for name in ("a", "b"):
        with pytest.raises(BadInputError, match=CUT) as caught:
            tensors.read(name)
        assert str(path) in str(caught.value)
    assert np.array_equal(held, ARRAY)


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_an_npz_file_that_is_cut_after_it_was_opened(tmp_path, savez):
    path = tmp_path / "0.npz"
    savez(path, np.random.default_rng(0).random((256, 256), np.float32))
    file = NpzFile.open(path)
    held = file.read(0)
    cut(path)
    with pytest.raises(BadInputError, match=CUT):
        file.read(0)
    with pytest.raises(BadInputError, match=CUT):
        file.read_into(0, np.empty_like(held))
    assert held.sum() > 0


def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    content = FileContent(path)
    (tmp_path / "y").write_bytes(b"after")
    os.replace(tmp_path / "y", path)
    assert content.read(0, 6).tobytes() == b"before"
    assert MemoryContent(b"before").read(2, 4).tobytes() == b"fo"


def test_a_file_that_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    content = FileContent(path)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("meshlm.formats.content.read_at", fail)
    with pytest.raises(MeshLMError, match=r"cannot be read \(Input/output error\)") as caught:
        content.read(0, 6)
    assert not isinstance(caught.value, BadInputError)


def test_an_arrow_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "data.arrow"
    batch = pyarrow.record_batch({"text": ["a line of text " * 20] * 1000})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, batch.schema) as file:
        for _ in range(20):
            file.write_batch(batch)
    with columns._arrow(str(path), "text", False) as (_, batches):
        assert next(batches).num_rows
        cut(path)
        with pytest.raises((pyarrow.ArrowException, OSError)):
            list(batches)


def test_nothing_is_mapped_that_others_may_cut():
    """torch maps a pickle in a process of its own, whose end is an error of ours."""
    maps = re.compile(r"\bmmap\b|memmap|memory_map|mmap_mode")
    folder = Path(meshlm.__file__).parent
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if any(maps.search(line.partition("#")[0]) for line in path.read_text().splitlines())
    }
    assert found == {"conversion/hf/pickled.py"}
