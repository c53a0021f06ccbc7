"""The command line: words into configurations, mistakes into lines and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tyro.conf import Positional

from meshlm.cli.help import command_help
from meshlm.cli.options import options_of
from meshlm.cli.parse import parse, sort
from meshlm.core.errors import BadInputError, BusyError, MeshLMError, StoppedError, UsageError

entry = importlib.import_module("meshlm.cli.main")


# Texts that look like options, or are some.
DASHED = ("-", "--", "---", "-h", "--help", "--verbose", "--dry", "--text", "-x", "--- a", "-5")
DASHED += ("--text=a", "--dry=", "-h=", "--tyro-print-completion")


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Sizes."""

    data: int = 1
    """Shards."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Do the thing."""

    path: Positional[Path]
    """Where."""
    text: str = "a"
    """What."""
    many: tuple[str, ...] = ()
    """Which."""
    count: int | None = None
    """How often. [once]"""
    rate: float | None = None
    """How fast."""
    kind: Literal["big", "small"] | None = None
    """How large."""
    dry: bool = False
    """Only look."""
    maybe: bool | None = None
    """Perhaps. [False]"""
    mesh: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.count == 13:
            raise UsageError("--count 13: give a luckier one")


def parsed(*words: str) -> Config:
    return parse(Config, sort(Config, words, "meshlm do"), "meshlm do")


def test_nothing_given():
    assert parsed("here") == Config(path=Path("here"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--count", "3"], {"count": 3}),
        (["--count=3"], {"count": 3}),
        (["--count", "3", "--count", "4"], {"count": 4}),
        (["--rate", "-1e-3"], {"rate": -1e-3}),
        (["--kind", "big"], {"kind": "big"}),
        (["--dry"], {"dry": True}),
        (["--dry", "false"], {"dry": False}),
        (["--dry", "True", "--count", "1"], {"dry": True, "count": 1}),
        (["--maybe"], {"maybe": True}),
        (["--maybe=False"], {"maybe": False}),
        (["--many", "a", "b"], {"many": ("a", "b")}),
        (["--many", "a", "--dry", "--many", "b"], {"many": ("a", "b"), "dry": True}),
        (["--many=-x"], {"many": ("-x",)}),
        (["--many", "---", "- a"], {"many": ("---", "- a")}),
        (["--mesh.data", "2"], {"mesh": Inner(data=2)}),
        (["--text", "--- b"], {"text": "--- b"}),
        (["--text", "-x"], {"text": "-x"}),
        (["--text="], {"text": ""}),
        (["--text", "a=b"], {"text": "a=b"}),
        (["--text=a=b"], {"text": "a=b"}),
        *(([f"--text={text}"], {"text": text}) for text in DASHED),
        *((["--text", text], {"text": text}) for text in DASHED),
        *(([f"--many={text}"], {"many": (text,)}) for text in DASHED),
        *((["--many", text], {"many": (text,)}) for text in DASHED),
        *((["--many", text, "--many", text, "b"], {"many": (text, text, "b")}) for text in DASHED),
        (["--count", "-5"], {"count": -5}),
        (["--count=-5"], {"count": -5}),
        (["--verbose", "--text", "--verbose", "--verbose"], {"text": "--verbose"}),
    ],
)
def test_values(words, wanted):
    assert parsed("here", *words) == Config(path=Path("here"), **wanted)


@settings(max_examples=30)
@given(st.text() | st.sampled_from(DASHED))
def test_any_text_is_a_value(text):
    assert parsed("here", "--text", text).text == text
    assert parsed("here", f"--text={text}").text == text
    assert parsed("here", "--many", text).many == (text,)
    assert parsed("--", text).path == Path(text)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--help"], (True, False)),
        (["a", "-h"], (True, False)),
        (["--help", "--no-such-option"], (True, False)),
        (["--verbose", "--help"], (True, True)),
        (["--text", "--help"], (False, False)),
        (["--text=-h", "--verbose"], (False, True)),
        (["--text", "--verbose"], (False, False)),
        (["--many", "a", "-h"], (True, False)),
        (["--dry", "--help"], (True, False)),
        (["--", "--help", "--verbose"], (False, False)),
    ],
)
def test_help_and_verbose_are_options_where_they_are_no_values(words, wanted):
    found = sort(Config, words, "meshlm do")
    assert (found.help, found.verbose) == wanted


def test_what_stands_after_two_dashes():
    assert parsed("--count", "3", "--", "--dry").path == Path("--dry")
    assert parsed("--many", "a", "--", "-x=1") == Config(path=Path("-x=1"), many=("a",))
    assert sort(Config, ["a", "--", "b", "--", "--dry"], "meshlm do").after == ["b", "--", "--dry"]
    assert parsed("a=b", "--text", "c=d").path == Path("a=b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "missing PATH: see `meshlm do --help`"),
        (["a", "b"], "unexpected b: see `meshlm do --help`"),
        (["a", "--cuont", "3"], "unknown option --cuont: did you mean --count?"),
        (["a", "--zzz"], "unknown option --zzz: see `meshlm do --help`"),
        (["a", "--zzz=3"], "unknown option --zzz: see `meshlm do --help`"),
        (["a", "-x"], "unknown option -x: see `meshlm do --help`"),
        (["a", "--count"], "--count has no value: see `meshlm do --help`"),
        (["a", "--count", "--dry"], "--count has no value: see `meshlm do --help`"),
        (["a", "--count", "--help"], "--count has no value: see `meshlm do --help`"),
        (["a", "--text"], "--text has no value: see `meshlm do --help`"),
        (["a", "--text", "--dry", "b"], "unexpected b: see `meshlm do --help`"),
        (["a", "--", "b"], "unexpected b: see `meshlm do --help`"),
        (["a", "--count", "-x"], "--count -x: give a whole number"),
        (["a", "--many"], "--many has no value: see `meshlm do --help`"),
        (["a", "--count", "x"], "--count x: give a whole number"),
        (["a", "--count", "1.5"], "--count 1.5: give a whole number"),
        (["a", "--mesh.data", "x"], "--mesh.data x: give a whole number"),
        (["a", "--rate", "x"], "--rate x: give a number"),
        (["a", "--kind", "bigg"], "--kind bigg: did you mean big? choose one of big, small"),
        (["a", "--count", "13"], "--count 13: give a luckier one"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UsageError) as caught:
        parsed(*words)
    assert str(caught.value) == said


@given(st.lists(st.text(st.characters(codec="ascii"), max_size=8), max_size=6))
def test_no_words_are_more_than_a_usage_error(words):
    with contextlib.suppress(UsageError):
        assert isinstance(parsed(*words), Config)


def test_options():
    found = {option.name: option for option in options_of(Config)}
    assert found["PATH"].is_positional
    assert found["PATH"].required
    assert found["--kind"].value == "{big,small}"
    assert found["--dry"].value == ""
    assert found["--maybe"].value == ""
    assert found["--many"].takes_many
    assert found["--count"].text == "How often. [once]"
    assert found["--mesh.data"].default == "1"


def test_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    text = command_help(Config, "meshlm do", ("meshlm do it",))
    assert text.startswith("usage: meshlm do PATH [OPTIONS]\n\nDo the thing.\n")
    assert "--text TEXT         What. [a]" in text
    assert text.endswith("examples:\n  meshlm do it")


# The entry point.


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MeshLMError("no"), 1),
        (UsageError("no"), 2),
        (BadInputError("no"), 3),
        (BusyError("no"), 4),
        (StoppedError("no", 75), 75),
        (OSError(28, "no"), 1),
    ],
)
def test_exit_codes(capsys, error, code):
    def work() -> int:
        raise error

    assert entry._guarded(work, lambda: False) == code
    assert capsys.readouterr().err == "meshlm: no\n"
    assert entry._guarded(work, lambda: True) == code
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("meshlm: no\n")


def test_what_nobody_foresaw_is_one_line_too(capsys):
    def work() -> int:
        raise RuntimeError("first\nsecond")

    assert entry._guarded(work, lambda: False) == 1
    assert capsys.readouterr().err == "meshlm: RuntimeError: first (--verbose shows where)\n"


def test_errors_are_one_line_of_plain_characters(capsys):
    entry._fail("bad\n\x1b[31mpath \udcff", 2, False)
    assert capsys.readouterr().err == "meshlm: bad\\n\\x1b[31mpath \\udcff\n"


def test_interrupted(capsys):
    def work() -> int:
        raise KeyboardInterrupt

    assert entry._guarded(work, lambda: False) == 130
    assert capsys.readouterr().err == "meshlm: interrupted\n"


def test_sigterm_is_75():
    with pytest.raises(StoppedError) as caught:
        entry._stop(75, signal.SIGTERM, None)
    assert caught.value.exit_code == 75
    # A run is gone on with; a server has nothing to save.
    codes = {command.words: command.stop_code for command in entry.COMMANDS}
    assert (codes["train"], codes["serve"]) == (75, 0)


def test_help_version_and_groups(capsys):
    assert entry.main([]) == 2
    assert entry.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in entry.COMMANDS:
        assert f"  {command.words}  " in out
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("meshlm 0.")
    assert entry.main(["data"]) == 0
    assert "data inspect" in capsys.readouterr().out


def test_help_needs_no_jax(cli):
    script = (
        "import sys; from meshlm.cli.main import main; "
        "code = main(['--help']) or main(['data', 'prepare', '--help']); "
        "sys.exit(code or 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=cli.environment(), capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("command", "again"), [("train", True), ("generate", False)])
def test_training_begins_again_on_huge_pages(command, again, monkeypatch):
    class BeganAgainError(Exception):
        pass

    def execve(program, arguments, environment):
        assert program == sys.executable
        assert arguments[-2:] == [command, "--help"]
        assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
        raise BeganAgainError

    variables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setattr(entry, "huge_page_variables", lambda: variables)
    monkeypatch.setattr("os.execve", execve)
    monkeypatch.setattr("sys.argv", ["meshlm", command, "--help"])
    monkeypatch.setattr("sys.orig_argv", ["python", "meshlm", command, "--help"])
    if again:
        with pytest.raises(BeganAgainError):
            entry.main()
    else:
        assert entry.main() == 0
