"""Makes the project's environments from the locks beside this file, with Python and pip.

    prepare.py main      .venv: the newest Python found; runs, tests and checks MeshLM
    prepare.py parity    .venv-parity: the oldest Python with a CPU build of torch, an oracle
    prepare.py engines   .venv-engines: Ray, to run the templates of launch/
    prepare.py lock      writes the locks again after a change of pyproject.toml

Each environment carries a stamp that names what it was made from. One whose stamp differs or is
missing (a lock changed, the folder moved, the last try was interrupted) is made again; else this is
a no-op.

pip installs, because it follows the user's own pip configuration (mirrors, certificates); uv is
faster but does not read it. Every file is checked against the lock's hashes.

Read from the environment, so `make test TORCH=...` works:
    PYTHON           the interpreter for .venv and .venv-engines
    PARITY_PYTHON    the interpreter for .venv-parity
    TORCH            pip arguments that name a CPU build of torch; .venv-parity remembers them
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "environment"
MAIN, PARITY, ENGINES = ROOT / ".venv", ROOT / ".venv-parity", ROOT / ".venv-engines"
VERSIONS = ("3.11", "3.12", "3.13")
LOCKED_GROUPS = {
    "main": ("dev", "clients"),
    "parity": ("dev", "parity"),
    "engines": ("dev", "engines"),
}

# A local version such as +cpu exists only where CPU builds are kept apart: the public index forbids
# them, so on Linux this never matches a CUDA build, and a miss is known before any download.
CPU_TORCH = "torch==2.13.0+cpu" if sys.platform == "linux" else "torch==2.13.0"


class PrepareError(Exception):
    """What stops the preparation, in one line with its remedy."""


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    path: str
    version: str  # "3.13"


def main(arguments: list[str]) -> int:
    try:
        match arguments:
            case ["main"]:
                prepare_main()
            case ["parity"]:
                prepare_main()
                prepare_parity()
            case ["engines"]:
                prepare_engines()
            case ["lock", *options]:
                write_locks(options)
            case _:
                raise PrepareError(
                    "usage: prepare.py main | parity | engines | lock [UV OPTION...]"
                )
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(
            f"error: {shlex.join(map(str, error.cmd))} failed; its output is above", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next run starts this environment again", file=sys.stderr)
        return 130
    return 0


def prepare_main() -> None:
    with locked(MAIN):
        if not is_current(MAIN, "main"):
            build(MAIN, "main", choose_main())


def prepare_parity() -> None:
    with locked(PARITY):
        torch = os.environ.get("TORCH") or remembered_torch() or CPU_TORCH
        if not is_current(PARITY, "parity"):
            chosen = choose_parity(torch)
            if chosen == try_interpreter(MAIN / "bin" / "python") and not has_torch(
                torch, chosen.version
            ):
                say_no_torch(torch)  # and a twin of .venv would test nothing more
                return
            build(PARITY, "parity", chosen)
        if remembered_torch() != torch:
            install_torch(torch)


def prepare_engines() -> None:
    with locked(ENGINES):
        if not is_current(ENGINES, "engines"):
            build(ENGINES, "engines", choose_main())


# Choosing an interpreter


def choose_main() -> Interpreter:
    """The newest supported interpreter, or the one that PYTHON names."""
    if named := os.environ.get("PYTHON"):
        return named_interpreter(named, "PYTHON")
    found = find_interpreters()
    if not found:
        raise PrepareError(
            "found no Python 3.11, 3.12 or 3.13 with venv and ensurepip on PATH or under pyenv:"
            " install one (on Debian python3-venv too), or name it: PYTHON=/path/to/python"
        )
    return found[-1]


def choose_parity(torch: str) -> Interpreter:
    """The oldest interpreter for which pip has that torch, else the oldest."""
    if named := os.environ.get("PARITY_PYTHON"):
        return named_interpreter(named, "PARITY_PYTHON")
    found = find_interpreters() or [choose_main()]
    return next((one for one in found if has_torch(torch, one.version)), found[0])


def find_interpreters() -> list[Interpreter]:
    """One working interpreter for each supported version, oldest first: PATH's, then pyenv's."""
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = []
    for version in VERSIONS:
        pyenvs = sorted(pyenv.glob(f"{version}*/bin"), key=numbers_in, reverse=True)
        names = [folder / f"python{version}" for folder in [*folders, *pyenvs]]
        names += [folder / "python3" for folder in folders]
        tried = (try_interpreter(name) for name in names if os.access(name, os.X_OK))
        if match := next((one for one in tried if one and one.version == version), None):
            found.append(match)
    return found


def numbers_in(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.parent.name)]


def named_interpreter(name: str, variable: str) -> Interpreter:
    path = shutil.which(name)
    if path and (interpreter := try_interpreter(Path(path))):
        return interpreter
    raise PrepareError(
        f"{variable}={name} is no working Python with venv and ensurepip: name another"
    )


def try_interpreter(path: Path) -> Interpreter | None:
    """The real interpreter behind `path`, be it a shim or in an environment; None if it fails."""
    facts = (
        "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2], sys._base_executable)"
    )
    try:
        run = subprocess.run([path, "-c", facts], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run.returncode != 0:
        return None
    version, _, executable = run.stdout.strip().partition(" ")
    return Interpreter(path=executable, version=version)


# Building an environment


def build(folder: Path, lock: str, interpreter: Interpreter) -> None:
    print(f"{folder.name}: Python {interpreter.version} ({interpreter.path})", flush=True)
    stamp_path(folder).unlink(
        missing_ok=True
    )  # first, so that half a removal is not taken for whole
    shutil.rmtree(folder, ignore_errors=True)
    run([interpreter.path, "-m", "venv", folder])
    (folder / ".gitignore").write_text("*\n")
    count = sum("==" in line for line in lock_path(lock).read_text().splitlines())
    print(
        f"{folder.name}: installing {count} locked packages (a minute; longer the first time)",
        flush=True,
    )
    pip(folder, "--no-deps", "--require-hashes", "-r", lock_path(lock))
    # The build backend is in the lock: the project itself installs with no network.
    pip(folder, "--no-index", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    write_stamp(folder, {"made_from": made_from(lock)})
    print(f"{folder.name}: ready", flush=True)


def has_torch(torch: str, version: str) -> bool:
    """Whether pip has that torch as a wheel for that version of Python."""
    # --target is what pip demands beside --python-version; with --dry-run nothing is written there.
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--only-binary", ":all:"]
    options += ["--python-version", version, "--target", str(MAIN / "unused")]
    command = pip_command(MAIN, *options, *shlex.split(torch))
    return subprocess.run(command, capture_output=True, env=clean_environment()).returncode == 0


def install_torch(torch: str) -> None:
    command = pip_command(PARITY, "--no-deps", "--only-binary", ":all:", *shlex.split(torch))
    found = subprocess.run(command, capture_output=True, env=clean_environment()).returncode == 0
    if found:
        write_stamp(PARITY, {**read_stamp(PARITY), "torch": torch})
        print(f"{PARITY.name}: {torch} installed", flush=True)
    else:
        say_no_torch(torch)


def say_no_torch(torch: str) -> None:
    print(
        f"{PARITY.name}: pip has no CPU build of torch ({torch}): the parity tests will be skipped;"
        f" to run them: make test TORCH='{CPU_TORCH} --extra-index-url PYTORCHS_CPU_WHEELS'",
        flush=True,
    )


def remembered_torch() -> str | None:
    return read_stamp(PARITY).get("torch")


def pip(folder: Path, *options: str | Path) -> None:
    run(pip_command(folder, *options))


def pip_command(folder: Path, *options: str | Path) -> list[str | Path]:
    # Twice quiet: errors still show, warnings about each mirror that lacks a package do not. And
    # compiling all modules takes as long as installing them; Python compiles the few that are used.
    fixed = ["-qq", "--disable-pip-version-check", "--no-input", "--no-compile"]
    return [folder / "bin" / "python", "-m", "pip", "install", *fixed, *options]


def run(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=clean_environment())


def clean_environment() -> dict[str, str]:
    """The environment without what would send pip or venv to another Python's packages."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in unwanted}


# Stamps and locks


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second `make` in this checkout out until the first is done with the environment."""
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder.name}: waiting for another make in this checkout", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_current(folder: Path, lock: str) -> bool:
    """Whether the environment is whole, made from these files and with the interpreter named."""
    if read_stamp(folder).get("made_from") != made_from(lock):
        return False
    current = try_interpreter(folder / "bin" / "python")
    named = os.environ.get("PARITY_PYTHON" if lock == "parity" else "PYTHON")
    return current is not None and (not named or named_interpreter(named, "PYTHON") == current)


def made_from(lock: str) -> str:
    """A digest of what an environment depends on; its own path too, as its scripts hold it."""
    content = read_pyproject()
    installed = [content["project"], content["build-system"], content["tool"]["hatch"]]
    digest = hashlib.sha256(json.dumps([str(ROOT), installed], sort_keys=True).encode())
    for path in (lock_path(lock), Path(__file__)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def stamp_path(folder: Path) -> Path:
    return folder / "meshlm-environment.json"


def read_stamp(folder: Path) -> dict[str, str]:
    try:
        return json.loads(stamp_path(folder).read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(folder: Path, content: dict[str, str]) -> None:
    partial = stamp_path(folder).with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(stamp_path(folder))


def lock_path(lock: str) -> Path:
    return LOCKS / f"{lock}.lock.txt"


def lock_header(lock: str) -> str:
    """The first lines of a lock: how to refresh it, and a digest of the requirements it answers."""
    content = read_pyproject()
    project = content["project"]
    groups = {name: content["dependency-groups"][name] for name in LOCKED_GROUPS[lock]}
    extras = project["optional-dependencies"]
    asked = [project["requires-python"], project["dependencies"], extras, groups]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return (
        f"# Written by `make lock` for every Python from 3.11.\n# Answers requirements {digest}\n"
    )


def write_locks(options: list[str]) -> None:
    if not (MAIN / "bin" / "uv").exists():
        prepare_main()
    for lock, groups in LOCKED_GROUPS.items():
        path = lock_path(lock)
        command = [
            MAIN / "bin" / "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--python-version",
            "3.11",
        ]
        command += ["--generate-hashes", "--no-annotate", "--no-header", "--all-extras"]
        # llm asks for pip: the environment's own does, and must not replace itself while it runs.
        command += ["--no-emit-package", "pip"]
        command += [option for group in groups for option in ("--group", group)]
        if lock != "main":
            command += ["--constraints", lock_path("main")]
        run([*command, *options, "--output-file", path, ROOT / "pyproject.toml"])
        path.write_text(lock_header(lock) + path.read_text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
