"""The token store: what it holds reads back, what is damaged does not."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from meshlm.cli import verify as verify_command
from meshlm.core.errors import BadInputError, MeshLMError, UsageError
from meshlm.data import number_file
from meshlm.data.inspection import InspectConfig, inspect
from meshlm.data.prepare import PrepareConfig, prepare
from meshlm.data.store import SPLITS, TokenStore, verify_store

DOCUMENTS = [f"Document {i}: " + "some words, ünïcode too; " * (i % 7 + 1) for i in range(200)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    lines = [
        json.dumps({"text": t, "meta": {"pile_set_name": "ab"[i % 2]}})
        for i, t in enumerate(DOCUMENTS)
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    out = folder / "store"
    prepare(PrepareConfig(paths=(str(folder / "in.jsonl"),), out=str(out), val_fraction=0.2))
    return out


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def documents(store: TokenStore, split: str) -> list[str]:
    """The documents' texts, read as the format says and no other way."""
    raw = np.fromfile(store.path / f"{split}.tokens.bin", "<u2").tolist()
    starts = np.fromfile(store.path / f"{split}.documents.bin", "<u8").tolist()
    texts = []
    for start, stop in zip(starts, [*starts[1:], len(raw)], strict=True):
        assert raw[stop - 1] == 50256
        texts.append(store.tokenizer.decode(raw[start : stop - 1]))
    return texts


def test_every_document_comes_back_in_order(made):
    store = TokenStore.open(made)
    splits = {split: documents(store, split) for split in SPLITS}
    assert sorted(splits["train"] + splits["val"]) == sorted(DOCUMENTS)
    for texts in splits.values():
        assert texts == [text for text in DOCUMENTS if text in texts]
    assert 20 < len(splits["val"]) < 60
    for split, texts in splits.items():
        counts = store.manifest.splits[split]
        assert counts.num_documents == len(texts) == len(store.document_starts(split))
        assert counts.num_bytes == sum(len(text.encode()) for text in texts)
        assert counts.num_tokens == store.num_tokens(split)


def test_counts_by_set_and_source_add_up(made):
    manifest = TokenStore.open(made).manifest
    (source,) = manifest.sources
    data = Path(source.path).read_bytes()
    assert (source.num_bytes, source.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(manifest.sets) == {"a", "b"}
    for split in SPLITS:
        whole = manifest.splits[split]
        assert source.counts[split] == whole
        for field in ("num_documents", "num_tokens", "num_bytes"):
            parts = sum(getattr(counts[split], field) for counts in manifest.sets.values())
            assert parts == getattr(whole, field)
    a_documents = sum(counts.num_documents for counts in manifest.sets["a"].values())
    assert a_documents == 100


def test_reading(made):
    store = TokenStore.open(made)
    raw = np.fromfile(made / "train.tokens.bin", "<u2")
    part = store.read("train", 5, 25)
    assert part.dtype == np.int32
    assert part.tolist() == raw[5:25].tolist()
    assert store.read("train", 3, 3).tolist() == []
    for start, stop in ((-1, 2), (5, 4), (0, len(raw) + 1)):
        with pytest.raises(ValueError, match="not within"):
            store.read("train", start, stop)


def test_verify_ignores_no_option(made):
    with pytest.raises(UsageError, match="--config test: only the original's checkpoints need one"):
        verify_command.run(verify_command.Config(path=made, config="test"))


def test_verify_finds_one_changed_byte_in_any_file(made, tmp_path):
    verify_store(made)
    for name in ("train.tokens.bin", "val.documents.bin", "tokenizer.json"):
        copy = Path(shutil.copytree(made, tmp_path / name))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(BadInputError, match=name):
            verify_store(copy)


def test_a_file_of_another_size_is_refused_at_once(copy):
    data = (copy / "val.tokens.bin").read_bytes()
    (copy / "val.tokens.bin").write_bytes(data[:-2])
    with pytest.raises(BadInputError, match=r"val\.tokens\.bin"):
        TokenStore.open(copy)
    (copy / "val.tokens.bin").unlink()
    with pytest.raises(BadInputError, match="missing"):
        TokenStore.open(copy)


def test_an_id_beyond_the_vocabulary_is_refused(copy):
    tokens = np.fromfile(copy / "train.tokens.bin", "<u2")
    tokens[10] = 50257
    tokens.tofile(copy / "train.tokens.bin")
    with pytest.raises(BadInputError, match="50257"):
        TokenStore.open(copy).read("train", 0, 20)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "newer"),
        ({"format": "other"}, "not the manifest"),
        ({"dtype": "uint32"}, "dtype"),
        ({"splits": {}}, "splits"),
        ({"files": {}}, "size of"),
        ({"sources": 3}, "damaged"),
        ({"tokenizer": None}, "damaged"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, why):
    manifest = json.loads((copy / "manifest.json").read_text()) | change
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInputError, match=why):
        TokenStore.open(copy)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 10_000, b"{}"])
def test_what_is_no_manifest_is_refused(copy, data):
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(BadInputError, match=r"manifest\.json"):
        TokenStore.open(copy)


def test_no_store_is_a_usage_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="no token store"):
            TokenStore.open(path)


def test_the_fingerprint_is_of_the_content(made, copy, tmp_path):
    assert TokenStore.open(copy).fingerprint == TokenStore.open(made).fingerprint
    (tmp_path / "other.txt").write_text("other")
    out = tmp_path / "other"
    prepare(PrepareConfig(paths=(str(tmp_path / "other.txt"),), out=str(out)))
    assert TokenStore.open(out).fingerprint != TokenStore.open(made).fingerprint


def test_inspect(made):
    text = inspect(InspectConfig(path=str(made)))
    for part in ("gpt2", "Document 0: some words, ünïcode", "in.jsonl", "--- val", "bytes/token"):
        assert part in text
    text = inspect(InspectConfig(path=str(made), json=True, samples=2))
    assert text.isascii()
    shown = json.loads(text)
    assert len(shown["samples"]["train"]) == 2
    assert shown["splits"]["val"]["num_tokens"] == TokenStore.open(made).num_tokens("val")


def test_inspect_shows_no_control_characters(tmp_path):
    (tmp_path / "a.txt").write_text("\x1b[31mred\x07")
    prepare(PrepareConfig(paths=(str(tmp_path / "a.txt"),), out=str(tmp_path / "s")))
    assert "\ufffd[31mred\ufffd" in inspect(InspectConfig(path=str(tmp_path / "s")))


# A store that others touch while it is in use.


@pytest.fixture
def looking_at_every_read(monkeypatch):
    monkeypatch.setattr(number_file, "_LOOK_EVERY_S", 0.0)


@pytest.mark.parametrize("name", ["train.tokens.bin", "train.documents.bin"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_store_that_is_cut_while_it_is_read_is_an_error(copy, name, kept):
    """Of a mapped file this is SIGBUS. The cut is noticed at once, without a look at the time."""
    store = TokenStore.open(copy)
    size = (copy / name).stat().st_size
    store.read("train", 0, 10)
    os.truncate(copy / name, int(size * kept))
    end = store.num_tokens("train")
    use = {
        "train.tokens.bin": lambda: store.read("train", end - 10, end),
        "train.documents.bin": lambda: store.document_starts("train")[-1],
    }
    with pytest.raises(BadInputError, match=rf"{name}: damaged .*{size:,} by its manifest") as told:
        use[name]()
    assert told.value.exit_code == 3
    assert "\n" not in str(told.value)


def test_a_store_that_is_replaced_is_read_on_as_it_was(copy, looking_at_every_read):
    store = TokenStore.open(copy)
    before = store.read("train", 0, 1000).tolist()
    for path in copy.iterdir():
        path.with_name("new").write_bytes(b"\1" * path.stat().st_size)
        path.with_name("new").replace(path)
    assert store.read("train", 0, 1000).tolist() == before
    shutil.rmtree(copy)
    assert store.read("train", 0, 1000).tolist() == before
    assert int(store.document_starts("train")[0]) == 0


def test_a_store_that_is_changed_is_an_error(copy, looking_at_every_read):
    store = TokenStore.open(copy)
    store.read("train", 0, 10)
    path = copy / "train.tokens.bin"
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"\1\0\2\0")
    os.utime(path, ns=(0, 1))
    with pytest.raises(BadInputError, match=r"train\.tokens\.bin: damaged \(its content changed"):
        store.read("train", 0, 10)
    with open(path, "ab") as file:
        file.write(b"\1\0")
    with pytest.raises(BadInputError, match=r"train\.tokens\.bin: damaged \(it has"):
        store.read("train", 0, 10)


def test_a_store_that_is_only_touched_is_read_on(copy, looking_at_every_read, monkeypatch):
    store = TokenStore.open(copy)
    before = store.read("train", 0, 1000).tolist()
    hashed = []
    monkeypatch.setattr(
        number_file, "hash_open", lambda d, real=number_file.hash_open: hashed.append(d) or real(d)
    )
    os.utime(copy / "train.tokens.bin", ns=(0, 1))
    for _ in range(3):
        assert store.read("train", 0, 1000).tolist() == before
    assert len(hashed) == 1, "read as a whole once, not at each read"


def test_a_disk_that_fails_is_an_error_and_no_damage(copy, monkeypatch):
    store = TokenStore.open(copy)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(number_file.os, "preadv", fail)
    with pytest.raises(MeshLMError, match=r"train\.tokens\.bin: cannot be read \(Input") as told:
        store.read("train", 0, 10)
    assert told.value.exit_code == 1


def test_a_store_that_is_given_up_closes_its_files(made, tmp_path):
    copy = Path(shutil.copytree(made, tmp_path / "store"))

    def count():
        paths = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(str(copy) in os.readlink(p) for p in paths if os.path.lexists(p))

    stores = [TokenStore.open(copy) for _ in range(5)]
    assert count() == 5 * 2 * len(SPLITS)
    del stores
    assert count() == 0


def test_parts_of_a_file(made):
    """Indices and slices as numpy has them, read in many short reads too."""
    store = TokenStore.open(made)
    starts = store.document_starts("train")
    whole = np.fromfile(made / "train.documents.bin", "<u8")
    for part in (slice(None), slice(3, 9), slice(-5, None), slice(9, 3), slice(150, 10**9)):
        assert np.array_equal(starts[part], whole[part])
    assert [int(starts[i]) for i in (0, 7, -1)] == [int(whole[i]) for i in (0, 7, -1)]
    with pytest.raises(IndexError):
        starts[len(starts)]


def test_short_reads_are_gone_on_with(made, monkeypatch):
    """A file system may give less than was asked for."""
    store = TokenStore.open(made)
    preadv = os.preadv
    monkeypatch.setattr(
        number_file.os, "preadv", lambda d, buffers, at: preadv(d, [buffers[0][:7]], at)
    )
    whole = np.fromfile(made / "train.tokens.bin", "<u2")
    assert store.read("train", 3, 1000).tolist() == whole[3:1000].tolist()
