"""Weights held against their certificate, and against the checksums of a download."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from meshlm.api import load
from meshlm.cli.main import main
from meshlm.conversion.convert import convert
from meshlm.conversion.opening import open_source
from meshlm.conversion.proof.certificate import CERTIFICATE_FILE
from meshlm.conversion.proof.record import check_all
from meshlm.core.errors import BadInputError, UsageError

FIXTURE = Path(__file__).parents[1] / "fixtures/mtj/dev_s4_distinct"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """What `convert` wrote in two formats."""
    folder = tmp_path_factory.mktemp("written")
    source = open_source(FIXTURE / "slim")
    convert(source, folder / "hf", to="hf")
    convert(source, folder / "mtj", to="mtj", shards=2)
    return {"hf": folder / "hf", "mtj": folder / "mtj"}


@pytest.fixture
def copies(written, tmp_path) -> dict[str, Path]:
    return {to: shutil.copytree(path, tmp_path / to) for to, path in written.items()}


def flip(path: Path, at: int) -> None:
    """Changes the lowest bit of a byte; a number stays finite."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_was_written_is_proved(written):
    for to, path in written.items():
        (proof,) = check_all(open_source(path))
        tensors = json.loads((path / CERTIFICATE_FILE).read_bytes())["destination"]["tensors"]
        assert proof.startswith(f"certificate.json: {len(tensors)} tensors and "), to
    # A file that was added is nobody's.
    (written["hf"] / "README.md").write_text("mine")
    assert check_all(open_source(written["hf"]))
    # A step's folder lies in the folder that has the certificate.
    (step,) = written["mtj"].glob("step_*")
    assert len(check_all(open_source(step))) == 1


def test_a_flipped_bit_of_a_tensor(copies, tmp_path, capsys):
    weights = copies["hf"] / "model.safetensors"
    flip(weights, weights.stat().st_size - 9)
    told = r"hf: [a-z.0-9_]+ is not as it was written: .*certificate\.json has another SHA-256"
    with pytest.raises(BadInputError, match=told):
        check_all(open_source(copies["hf"]))
    with pytest.raises(BadInputError, match=told):
        convert(open_source(copies["hf"]), tmp_path / "out", to="meshlm")
    with pytest.raises(BadInputError, match=told):
        load(copies["hf"], verify=True)
    load(copies["hf"])
    assert not (tmp_path / "out").exists()
    path = str(copies["hf"])
    for words in (["verify", path], ["compare", path, "--verify"]):
        assert main(words) == 3
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "delete certificate.json" in said
    for words in (["generate", path, "--prompt", "a"], ["serve", path, "--port", "0"]):
        assert main([*words, "--verify"]) == 3
        assert "delete certificate.json" in capsys.readouterr().err


def test_weights_of_the_original_that_were_replaced(copies, written, tmp_path):
    other = tmp_path / "other"
    convert(open_source(FIXTURE / "slim"), other, to="mtj", shards=2, dtype="bfloat16")
    (mine,), (theirs,) = copies["mtj"].glob("step_*"), other.glob("step_*")
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(BadInputError, match=r"shard_0/.* is not as it was written"):
        check_all(open_source(copies["mtj"]))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_beside_the_tensors(copies, tmp_path, name):
    file = copies["hf"] / name
    content = json.loads(file.read_bytes()) | {"transformers_version": "4.0"}
    file.write_text(json.dumps(content))
    with pytest.raises(BadInputError, match=f"{name} is not as it was written: .*delete cert"):
        check_all(open_source(copies["hf"]))
    with pytest.raises(BadInputError, match=f"{name} is not as it was written"):
        convert(open_source(copies["hf"]), tmp_path / "out", to="meshlm")


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("gone"),
    ],
    ids=["pipe", "folder", "circle", "dangling"],
)
def test_a_certificate_that_is_no_file_is_not_taken_for_none(copies, make, tmp_path):
    path = copies["hf"] / CERTIFICATE_FILE
    path.unlink()
    make(path)
    with pytest.raises(BadInputError, match="is no file, or a link that leads to none"):
        check_all(open_source(copies["hf"]))
    with pytest.raises(BadInputError, match="is no file, or a link that leads to none"):
        convert(open_source(copies["hf"]), tmp_path / "out", to="meshlm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"certificate": 1}',
        b'{"certificate": 2, "destination": {"format": "hf", "tensors": {}}}',
        b'{"certificate": 1, "destination": {"format": "mtj", "tensors": {}}}',
        b'{"certificate": 1, "destination": {"format": "hf", "tensors": {"a": 1}}}',
        b'{"certificate": 1, "destination": {"format": "hf", "tensors": {}, '
        b'"sha256": {"../x": "0"}}}',
        b"[" * 5000,
    ],
)
def test_a_certificate_that_is_none(copies, content):
    (copies["hf"] / CERTIFICATE_FILE).write_bytes(content)
    with pytest.raises(BadInputError, match="is not a certificate of the weights beside it"):
        check_all(open_source(copies["hf"]))


def test_one_from_before_files_were_hashed(copies):
    path = copies["hf"] / CERTIFICATE_FILE
    content = json.loads(path.read_bytes())
    del content["destination"]["sha256"]
    path.write_text(json.dumps(content))
    assert check_all(open_source(copies["hf"]))
    del content["destination"]["tensors"]["lm_head.bias"]
    path.write_text(json.dumps(content))
    with pytest.raises(BadInputError, match=r"lm_head\.bias is not as it was written"):
        check_all(open_source(copies["hf"]))


def test_without_any_record(copies, capsys):
    (copies["hf"] / CERTIFICATE_FILE).unlink()
    assert check_all(open_source(copies["hf"])) == []
    with pytest.raises(UsageError, match=r"--verify: .* neither the certificate\.json"):
        load(copies["hf"], verify=True)
    assert main(["verify", str(copies["hf"])]) == 0
    said = capsys.readouterr().out
    assert "readable, but not proved" in said
    assert "nothing says what the bytes should be" in said


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def test_a_cache_of_the_hub(written, tmp_path):
    """As huggingface_hub keeps it: links from a snapshot to blobs named by their checksum."""
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        data = (written["hf"] / name).read_bytes()
        is_large = name == "model.safetensors"
        blob = blobs / (hashlib.sha256(data).hexdigest() if is_large else git_hash(data))
        blob.write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    (proof,) = check_all(open_source(snapshot))
    assert proof.endswith("download: config.json, generation_config.json, model.safetensors")
    load(snapshot, verify=True)
    flip(snapshot / "model.safetensors", -3)
    with pytest.raises(BadInputError, match=r"model\.safetensors is not what was downloaded"):
        check_all(open_source(snapshot))


def test_a_folder_that_was_downloaded(copies, capsys):
    folder = copies["hf"]
    (folder / CERTIFICATE_FILE).unlink()
    records = folder / ".cache/huggingface/download"
    records.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        data = (folder / name).read_bytes()
        tag = hashlib.sha256(data).hexdigest() if name[0] == "m" else git_hash(data)
        (records / f"{name}.metadata").write_text(f"{'0' * 40}\n{tag}\n1700000000.0\n")
    (records / "tokenizer.json.metadata").write_bytes(b"\xff\n")
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("the checksums of the download: config.json, model.safetensors\n")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert main(["verify", str(folder)]) == 3
    assert "config.json is not what was downloaded" in capsys.readouterr().err
