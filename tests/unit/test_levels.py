"""A module imports from lower levels and from its own room only, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = SOURCE / "meshlm"

# The rooms of the house, a folder or a file each. A room stands on those with a lower number; rooms
# of one number do not know each other.
LEVELS = {
    "core": 0,
    "formats": 1,
    "ops": 1,
    "model": 2,
    "data": 3,
    "optim": 3,
    "checkpoint": 3,
    "generation": 3,
    "step": 4,
    "conversion": 4,
    "serving": 4,
    "planning": 5,
    "training": 6,
    "evaluation": 6,
    "api": 6,
    "comparison": 7,
    "demo": 7,
    "doctor": 7,
    "cli": 8,
    "__init__": 8,
    "__main__": 8,
}
FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "helper", "manager")
# Pure rooms: no file, network or log.
PURE = ("ops", "model", "optim", "step")
INPUT_OUTPUT = ("logging", "pathlib", "socket", "urllib", "http", "requests", "httpx", "shutil")

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`meshlm.core.tree` for src/meshlm/core/tree.py, `meshlm.core` for its __init__."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(tree: ast.AST, path: Path, known: frozenset[str] = frozenset()) -> Iterator[str]:
    """The full name of every module that the file imports, wherever in the file that stands.

    Args:
        known: modules and packages; `from package import name` is that module where it is one, and
            a room of `meshlm` always.
    """
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for full in (f"{base}.{alias.name}" for alias in node.names):
                yield full if base == "meshlm" or full in known else base


def broken_rules(source: str, path: Path) -> list[str]:
    """What the file may not import, in words."""
    room = room_of(name_of(path))
    found = []
    for imported in imports_of(ast.parse(source), path):
        if imported.split(".")[0] != "meshlm":
            if room in PURE and imported.split(".")[0] in INPUT_OUTPUT:
                found.append(f"{room} does no I/O but imports {imported}")
            continue
        other = room_of(imported)
        if other not in LEVELS:
            found.append(f"{imported}: no room of that name")
        elif other != room and LEVELS[other] >= LEVELS[room]:
            found.append(f"{room} ({LEVELS[room]}) imports {imported} ({LEVELS[other]})")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_imports_downwards(path: Path) -> None:
    assert room_of(name_of(path)) in LEVELS, "give the new room a level here and in the design"
    assert broken_rules(path.read_text(), path) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    known = frozenset(map(name_of, FILES))
    graph = {
        name_of(path): {*imports_of(ast.parse(path.read_text()), path, known)}
        & known - {name_of(path)}
        for path in FILES
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)
    room = {"meshlm.a": {"meshlm.b"}, "meshlm.b": {"meshlm.a"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(room).prepare()


def test_names_say_something() -> None:
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert names.isdisjoint(FORBIDDEN_NAMES)


def test_scheduler_does_without_jax() -> None:
    path = PACKAGE / "serving" / "scheduler.py"
    if path.exists():
        roots = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()), path)}
        assert roots.isdisjoint({"jax", "jaxlib", "numpy"})


def test_the_api_does_without_the_server_around_it() -> None:
    paths = [*(PACKAGE / "serving").glob("*.py"), *(PACKAGE / "serving" / "api").glob("*.py")]
    assert len(paths) > 20
    for path in paths:
        assert "meshlm.serving.http" not in ast.unparse(ast.parse(path.read_text())), path


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/tree.py", "import meshlm.model.params"),
        ("core/tree.py", "from meshlm import step"),
        ("core/tree.py", "def f():\n    from meshlm.cli import main"),
        ("data/store.py", "from meshlm.checkpoint import restore"),
        ("data/store.py", "from ..generation import decode"),
        ("generation/decode.py", "from meshlm.data.tokenizer import Tokenizer"),
        ("ops/loss.py", "from ..model.config import ModelConfig"),
        ("optim.py", "from meshlm.step import TrainState"),
        ("model/config.py", "import logging"),
        ("api.py", "import meshlm"),
        ("api.py", "from meshlm.nowhere import x"),
        ("training/loop.py", "from . import metrics\nfrom .. import api"),
    ],
)
def test_rule_catches(file: str, line: str) -> None:
    assert broken_rules(line, PACKAGE / file) != []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/tree.py", "import logging\nfrom meshlm.core import errors\nfrom . import errors"),
        ("data/__init__.py", "from .store import TokenStore"),
        ("step.py", "from meshlm.optim import make_optimizer"),
        (
            "training/loop.py",
            "from ..data.store import TokenStore\nfrom .metrics import MetricsLog",
        ),
        ("cli.py", "from meshlm import api, demo"),
    ],
)
def test_rule_allows(file: str, line: str) -> None:
    assert broken_rules(line, PACKAGE / file) == []
