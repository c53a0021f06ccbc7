"""The fingerprint of a server: it changes with what answers, and with nothing else."""

from __future__ import annotations

from pathlib import Path

from meshlm.serving.http.fingerprint import fingerprint


def checkpoint(folder: Path, manifest: str = "{}", weights: bytes = b"1234") -> Path:
    step = folder / "checkpoints" / "step_1"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(manifest)
    (step / "weights").write_bytes(weights)
    return folder


def test_copies_have_one_fingerprint(tmp_path):
    one, other = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert fingerprint(one) == fingerprint(other)
    assert len(fingerprint(one)) == len("fp_0123456789ab")


def test_manifests_and_settings_tell_apart(tmp_path):
    one = checkpoint(tmp_path / "a")
    # As long as the other: it is read, not measured.
    other = checkpoint(tmp_path / "b", manifest="[]")
    found = {fingerprint(one), fingerprint(other), fingerprint(one, "int8"), fingerprint(one, None)}
    assert len(found) == 4
    assert fingerprint(one, "int8", None) != fingerprint(one, None, "int8")


def test_weights_without_a_manifest_are_told_apart_by_size(tmp_path):
    for name, data in (("a", b"12"), ("b", b"123")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    archive = tmp_path / "step_1.tar.zst"
    archive.write_bytes(b"12")
    found = {fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b"), fingerprint(archive)}
    assert len(found) == 3
