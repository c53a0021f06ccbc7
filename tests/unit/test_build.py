"""The locks answer pyproject.toml, the wheel holds the package's data, nothing names a machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("main", "parity")
PYTHONS = ("3.11", "3.12", "3.13")


def load_prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "environment" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


prepare = load_prepare()


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def read_lock(lock: str) -> list[Requirement]:
    joined = prepare.lock_path(lock).read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    assert all("--hash=sha256:" in line for line in lines)
    return [Requirement(line.split(" --hash")[0]) for line in lines]


def pins(lock: str, python: str) -> dict[str, str]:
    """The version of each package that the lock gives on Linux with that Python."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found = {}
    for requirement in read_lock(lock):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert canonicalize_name(requirement.name) not in found
            found[canonicalize_name(requirement.name)] = pin.version
    return found


def group(name: str) -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"][name]


def asked_for(lock: str) -> list[Requirement]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = content["project"]["dependencies"] + content["build-system"]["requires"]
    groups = [group(name) for name in prepare.LOCKED_GROUPS[lock]]
    for more in [*content["project"]["optional-dependencies"].values(), *groups]:
        lines += more
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_answers_pyproject(lock: str) -> None:
    header = prepare.lock_header(lock)
    assert prepare.lock_path(lock).read_text().startswith(header), "run `make lock`"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_each_requirement(lock: str, python: str) -> None:
    pinned = pins(lock, python)
    for requirement in asked_for(lock):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_agree(python: str) -> None:
    main, parity = pins("main", python), pins("parity", python)
    # The group `clients`, and what it alone brings, is in main only.
    both = main.keys() & parity.keys()
    assert both >= {canonicalize_name(requirement.name) for requirement in asked_for("parity")} - {
        canonicalize_name(Requirement(line).name) for line in group("parity")
    }
    assert {name: main[name] for name in both} == {name: parity[name] for name in both}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_brings_no_torch_and_no_cuda(lock: str) -> None:
    names = {requirement.name for requirement in read_lock(lock)}
    assert not [name for name in names if re.match(r"torch$|triton|nvidia|cuda|jax-cuda", name)]


def test_run_time_needs_no_other_framework() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {Requirement(line).name for line in content["project"]["dependencies"]}
    assert names.isdisjoint({"torch", "transformers", "tensorflow", "ray", "gradio"})


# Put together here, so that this file does not match itself.
HOSTS = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs", "deb." + "debian"]
FOLDERS = ["/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/", "/Us" + "ers/", "/tm" + "p/", "/op" + "t/"]
UNWANTED = re.compile("|".join([*map(re.escape, HOSTS), *(rf"(?<![\w.$}}]){f}" for f in FOLDERS)]))


def test_tracked_files_name_no_machine() -> None:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        # The vocabulary is data, and a NUL means binary.
        if path.suffix == ".bpe" or b"\0" in content:
            continue
        for number, line in enumerate(content.decode().splitlines(), 1):
            if match := UNWANTED.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


@pytest.mark.parametrize("text", [HOSTS[0] + "/simple", "cd " + FOLDERS[0], f'"{FOLDERS[4]}x"'])
def test_machine_is_recognised(text: str) -> None:
    assert UNWANTED.search(text)


def test_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.getinfo(name).file_size for name in archive.namelist()}
    package = ROOT / "src" / "meshlm"
    wanted = {path for path in tracked_files() if path.is_relative_to(package)}
    wanted |= set((package / "data" / "gpt2").glob("*"))
    for path in wanted:
        assert inside[str(path.relative_to(ROOT / "src"))] == path.stat().st_size
    licences = [name for name in inside if ".dist-info/licenses/" in name]
    assert {Path(name).name for name in licences} == {"LICENSE", "NOTICE"}
    assert not [name for name in inside if not name.startswith(("meshlm/", "meshlm-"))]
