"""Folders of what is run as it lies there: the user's own, or none."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest

from meshlm.core.compile_cache import prepare_compile_cache
from meshlm.core.errors import UsageError
from meshlm.core.private_folder import make_private, private_folder, why_not_private

OTHER_USER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


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
    with pytest.raises(UsageError, match=r"is (a folder of )?user \d+.*: choose a folder"):
        private_folder("compiled")


def test_a_shared_folder_in_which_each_keeps_his_own_will_do(base: Path) -> None:
    base.mkdir()
    base.chmod(0o1777)
    assert private_folder("kernels") == base / "meshlm" / "kernels"


# Everything on the way from / on, for both: what is given, and the default below XDG_CACHE_HOME.


@pytest.fixture(params=["given", "default"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Asks for the folder `cache` below another one; the answer is the folder or the message."""

    def ask(above: Path) -> Path | str | None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(above / "cache"))
        given = str(above / "cache") if request.param == "given" else None
        try:
            return prepare_compile_cache(given)
        except UsageError as error:
            told = str(error)
        assert "others can write there, and what is there is run: " in told
        assert "\n" not in told
        return told

    return ask


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o770, 0o757])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_above_that_others_can_write_to(
    ask, tmp_path: Path, mode: int, depth: int
) -> None:
    above = tmp_path / "a" / "b" / "c"
    above.mkdir(parents=True)
    loose = above.parents[depth - 1] if depth else above
    loose.chmod(mode)
    told = ask(above)
    assert f"{loose} has mode {mode:04o}: chmod go-w it, or choose" in told
    assert not (above / "cache").exists(), "nothing is made there"
    loose.chmod(0o755)
    assert isinstance(ask(above), Path)


@pytest.mark.parametrize("mode", [0o1777, 0o1775])
def test_the_sticky_bit_protects_what_is_below(ask, tmp_path: Path, mode: int) -> None:
    above = tmp_path / "shared"
    above.mkdir()
    above.chmod(mode)
    assert isinstance(ask(above), Path)


def test_it_does_not_protect_the_folder_itself(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(UsageError, match=r"cache has mode 1777: chmod 700 it"):
        prepare_compile_cache(str(folder))


@pytest.mark.parametrize("absolute", [True, False])
def test_where_a_link_leads_is_looked_at_too(ask, tmp_path: Path, absolute: bool) -> None:
    (tmp_path / "loose" / "inner").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    target = tmp_path / "loose" / "inner" if absolute else Path("../loose/./inner")
    (tmp_path / "mine" / "link").symlink_to(target)
    assert isinstance(ask(tmp_path / "mine" / "link"), Path)
    (tmp_path / "loose").chmod(0o777)
    assert f"{tmp_path / 'loose'} has mode 0777" in ask(tmp_path / "mine" / "link")
    # The other way round: a good place, by a name that others can turn.
    (tmp_path / "loose" / "link").symlink_to(tmp_path / "mine")
    assert f"{tmp_path / 'loose'} has mode 0777" in ask(tmp_path / "loose" / "link")


def test_dots_are_those_of_the_real_folders(tmp_path: Path) -> None:
    """`link/..` is the folder above the link's target, and not that of the link."""
    (tmp_path / "loose" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("loose/inner")
    (tmp_path / "loose" / "cache").mkdir(mode=0o700)
    assert why_not_private(tmp_path / "link" / ".." / "cache") is None
    (tmp_path / "loose").chmod(0o777)
    told = why_not_private(tmp_path / "link" / ".." / "cache")
    assert told is not None
    assert str(tmp_path / "loose") in told


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(UsageError, match=r"--compile-cache .*Too many levels"):
        prepare_compile_cache(str(tmp_path / "one" / "cache"))


@as_root
def test_a_folder_of_another_user(ask, tmp_path: Path) -> None:
    above = tmp_path / "theirs" / "mine"
    above.mkdir(parents=True)
    os.chown(above.parent, OTHER_USER, -1)
    assert f"{above.parent} is a folder of user {OTHER_USER}: choose" in ask(above)


@as_root
def test_a_link_of_another_user(ask, tmp_path: Path) -> None:
    """It leads to a folder of ours today; its owner can turn it tomorrow."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    os.chown(tmp_path / "link", OTHER_USER, -1, follow_symlinks=False)
    assert f"{tmp_path / 'link'} is a link of user {OTHER_USER}: choose" in ask(tmp_path / "link")


@as_root
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_the_last_one_of_another_user(kind: str, tmp_path: Path) -> None:
    """In a shared folder like /tmp a stranger may have been there first."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "mine").mkdir(mode=0o700)
    folder = tmp_path / "shared" / "cache"
    if kind == "link":
        folder.symlink_to(tmp_path / "mine")
    else:
        folder.mkdir(mode=0o700)
    os.chown(folder, OTHER_USER, -1, follow_symlinks=False)
    with pytest.raises(UsageError, match=f"cache is a {kind} of user {OTHER_USER}: choose"):
        prepare_compile_cache(str(folder))
    assert os.listdir(tmp_path / "mine") == []


@as_root
def test_a_user_below_folders_of_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual case: / and /home are root's, the folder is the user's."""
    folder = tmp_path / "home" / "cache"
    folder.mkdir(parents=True)
    os.chown(folder, OTHER_USER, -1)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER_USER)
    assert why_not_private(folder) is None
    os.chown(folder, 0, -1)
    told = why_not_private(folder)
    assert told == f"{folder} is user 0's: choose a folder of yours"
