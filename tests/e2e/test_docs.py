"""The commands in README.md and docs/*.md work as they stand.

The ```console fences of a file run in order, in one temporary folder for the file, each line that
starts with `$ ` by itself; `meshlm` and `python` are those of this environment. A command must exit
0. A fence that cannot run here (a cluster, a GPU, `make`) is marked ```console no-run. The options
and the make targets of every command must exist. `make test` runs the commands of README.md, and
`make test-long` those of docs/.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if path.exists()]
FENCE = re.compile(r"^```console(?P<marker>[^\n]*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:|#)([^)#\s]+)")
TIMEOUT_S = 300
README_FIRST = [
    path if path.name == "README.md" else pytest.param(path, marks=pytest.mark.long)
    for path in PAGES
]
# What `--help` shows, by command: asked for once.
SHOWN: dict[tuple[str, ...], Any] = {}


@dataclass(frozen=True, kw_only=True)
class Command:
    text: str
    line: int
    runs: bool


def commands_in(page: str) -> Iterator[Command]:
    """Each command of the page's console fences, its continuation lines joined."""
    for fence in FENCE.finditer(page):
        marker = fence["marker"].strip()
        assert marker in ("", "no-run"), f"unknown marker on a console fence: {marker!r}"
        first = page.count("\n", 0, fence.start("body")) + 1
        lines = fence["body"].splitlines()
        for offset, line in enumerate(lines):
            if line.startswith("$ "):
                text = line[2:]
                while text.endswith("\\"):
                    offset += 1
                    text = text[:-1] + lines[offset].removeprefix("> ").strip()
                yield Command(text=text, line=first + offset, runs=marker == "")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", README_FIRST, ids=page_name)
@pytest.mark.timeout(900)
def test_commands_run(path: Path, tmp_path: Path, cli: Any, compiled: dict[str, str]) -> None:
    for command in commands_in(path.read_text()):
        if command.runs:
            done = subprocess.run(
                ["bash", "-c", command.text],
                cwd=tmp_path,
                env=cli.environment() | compiled,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            where = f"{path.name}:{command.line}: {command.text}"
            assert done.returncode == 0, f"{where}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_exist(path: Path, cli: Any) -> None:
    for command in commands_in(path.read_text()):
        # What runs has quotes and loops of the shell around it, which nothing here reads.
        if not command.runs or command.text.startswith("meshlm "):
            problems = unknown_words(command.text, cli)
            assert not problems, f"{path.name}:{command.line}: {command.text}: {problems}"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def unknown_words(text: str, cli: Any) -> list[str]:
    """The commands and options of `meshlm` and the targets of `make` in it that do not exist."""
    found = []
    for part in re.split(r"&&|\|\|?|;", text):
        words = shlex.split(part, comments=True)
        for position, word in enumerate(words):
            if Path(word).name == "meshlm":
                found += unknown_options(words[position + 1 :], cli)
                break  # a later one is a value, as in `--to meshlm`
            if word == "make":
                targets = [word for word in words[position + 1 :] if re.fullmatch(r"[a-z-]+", word)]
                found += [target for target in targets if not has_target(target)]
    return found


def unknown_options(arguments: list[str], cli: Any) -> list[str]:
    if "--" in arguments:
        end = arguments.index("--")
        own, started = arguments[:end], arguments[end + 1 :]
        return unknown_options(own, cli) + unknown_options(started, cli)
    options = [word.partition("=")[0] for word in arguments if re.match(r"--[a-z]", word)]
    # `data prepare` is two words; what follows `generate` is a path.
    count = 2 if arguments[:1] in (["data"], ["launch"]) else 1
    words = tuple(arguments[:count])
    if words not in SHOWN:
        SHOWN[words] = cli(*words, "--help", env={"COLUMNS": "200", "NO_COLOR": "1"})
    shown = SHOWN[words]
    if shown.returncode != 0:
        return [" ".join(words)]
    return [
        name for name in options if not re.search(rf"{re.escape(name)}(?![\w.-])", shown.stdout)
    ]


def has_target(target: str) -> bool:
    makefile = (ROOT / "Makefile").read_text()
    return re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) is not None


PAGE = """# Title
```console
$ first --a \\
    --b
output
$ second
```
```python
$ not a command
```
```console no-run
$ make demo
```
"""


def test_commands_are_found() -> None:
    found = [(command.text, command.line, command.runs) for command in commands_in(PAGE)]
    expected = [("first --a --b", 4, True), ("second", 6, True), ("make demo", 12, False)]
    assert found == expected


def test_unknown_target_is_found(cli: Any) -> None:
    assert unknown_words("make demo ARGS=1 && make demmo", cli) == ["demmo"]


@pytest.mark.parametrize(
    ("command", "unknown"),
    [
        ("meshlm train --preset demo --steps 10", []),
        ("meshlm train --presset demo", ["--presset"]),
        ("srun .venv/bin/meshlm generate runs/a --prompt x --step", ["--step"]),
        ("meshlm data prepair a --out b", ["data prepair"]),
        ("meshlm launch local -n 2 -- train --steps 2 --stepps 3", ["--stepps"]),
    ],
)
def test_unknown_option_is_found(command: str, unknown: list[str], cli: Any) -> None:
    assert unknown_words(command, cli) == unknown
