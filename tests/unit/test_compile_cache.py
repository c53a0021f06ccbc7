"""Folders of what is run as it lies there: the user's own, or none."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest

from meshlm.core.compile_cache import prepare_compile_cache
from meshlm.core.errors import UsageError
from meshlm.core.private_folder import make_private, private_folder


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_every_folder_that_is_made_is_its_owners_alone(base: Path) -> None:
    before = os.umask(0)
    try:
        found = prepare_compile_cache(None)
        make_private(base / "a" / "b")
    finally:
        os.umask(before)
    assert found is not None
    assert found == base / "meshlm" / "compiled"
    for folder in (base, base / "meshlm", found, base / "a", base / "a" / "b"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


@pytest.mark.parametrize("given", ["", "relative", None])
def test_a_folder_that_is_not_absolute_is_not_heard(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert private_folder("kernels") == tmp_path / "home" / ".cache" / "meshlm" / "kernels"


@pytest.mark.parametrize("cache", [None, "relative"])
def test_a_user_without_a_home_has_none(
    cache: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    if cache is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert private_folder("kernels") is None
    assert prepare_compile_cache(None) is None
    assert not list(tmp_path.iterdir()), "nothing is made where the user happens to be"


def test_a_folder_that_cannot_be_made_is_none(base: Path) -> None:
    base.touch()
    assert private_folder("kernels") is None
    assert prepare_compile_cache(None) is None
    with pytest.raises(UsageError, match="--compile-cache"):
        prepare_compile_cache(str(base / "given"))


@pytest.mark.parametrize("name", [".", "meshlm", "meshlm/compiled"])
def test_one_that_others_can_write_to_is_refused(name: str, base: Path) -> None:
    (base / "meshlm" / "compiled").mkdir(parents=True)
    (base / name).chmod(0o777)
    with pytest.raises(UsageError, match="others can write there"):
        prepare_compile_cache(None)
    (base / name).chmod(0o700)
    assert prepare_compile_cache(None) == base / "meshlm" / "compiled"


def test_one_of_others_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_folder("compiled")
    monkeypatch.setattr(os, "geteuid", lambda: base.stat().st_uid + 1)
    with pytest.raises(UsageError, match="must be yours"):
        private_folder("compiled")


def test_a_shared_folder_in_which_each_keeps_his_own_will_do(base: Path) -> None:
    base.mkdir()
    base.chmod(0o1777)
    assert private_folder("kernels") == base / "meshlm" / "kernels"
