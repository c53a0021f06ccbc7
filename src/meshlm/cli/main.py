"""The entry point: finds the command, runs it, and turns errors into a line and an exit code."""

import difflib
import functools
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType
from typing import Any

from meshlm.cli.help import command_help
from meshlm.cli.parse import parse
from meshlm.core import processes
from meshlm.core.errors import MeshLMError, StoppedError, UsageError
from meshlm.core.platform import huge_page_variables

_HELP = ("-h", "--help")
_TRAINING = (["train"], ["demo"])


@dataclass(frozen=True)
class Command:
    """One command: its words, and the module in meshlm.cli with `Config`, `run`, `EXAMPLES`."""

    words: str
    module: str
    summary: str
    stop_code: int = 75
    """Exit code after SIGTERM, until the command has a handler of its own."""
    passes_on: bool = False
    """What stands after -- is not its own: `run` takes it as words."""


# A module is imported when its command runs, so that help and mistakes answer at once.
COMMANDS = (
    Command("demo", "demo", "train a small GPT-J on text found here, and let it write"),
    Command("data prepare", "prepare", "turn text into a token store"),
    Command("data inspect", "inspect", "show what a token store holds"),
    Command("train", "train", "train a model, or go on where a run stopped"),
    Command("generate", "generate", "let a model continue a prompt"),
    Command(
        "serve", "serve", "serve a model: an OpenAI-compatible API and a web page", stop_code=0
    ),
    Command("convert", "convert", "turn weights into another format, with a certificate"),
    Command("convert-config", "convert_config", "turn the original's configuration into ours"),
    Command("compare", "compare", "say how far two checkpoints or profiles are apart"),
    Command("verify", "verify", "check a run, a checkpoint or a token store for damage"),
    Command("launch local", "launch", "train as several processes on this machine", passes_on=True),
    Command("plan", "plan", "tell what a training step needs and takes, on devices not here"),
    Command("doctor", "doctor", "tell what this machine and this installation can do"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of `meshlm ARGUMENTS...` (the process's own, unless given)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and words[:1] in _TRAINING:
        _begin_again_on_huge_pages()
    verbose = "--verbose" in words
    words = [word for word in words if word != "--verbose"]
    if not verbose:
        # Orbax logs tracebacks of what it raises again and what we then say in a line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    code = _guarded(lambda: _run(words), verbose)
    processes.leave()
    return code


def _begin_again_on_huge_pages() -> None:
    """Replaces this process by itself in the environment that training is faster in, if any is.

    The C library reads its settings when a process begins, so they cannot be changed in it.
    """
    variables = huge_page_variables()
    if variables:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


def _run(words: list[str]) -> int:
    if not words or words[0] in _HELP:
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"meshlm {version('meshlm')}")
        return 0
    command, rest = _find(words)
    # From the first moment on: what can be saved is saved by the command's own handler.
    signal.signal(signal.SIGTERM, functools.partial(_stop, command.stop_code))
    module = importlib.import_module(f"meshlm.cli.{command.module}")
    prog = f"meshlm {command.words}"
    passed_on: tuple[list[str], ...] = ()
    if command.passes_on:
        at = rest.index("--") if "--" in rest else len(rest)
        rest, passed_on = rest[:at], (rest[at + 1 :],)
    if any(word in _HELP for word in rest):
        print(command_help(module.Config, prog, module.EXAMPLES))
        return 0
    if hasattr(module, "expand"):
        rest = module.expand(rest)
    return module.run(parse(module.Config, rest, prog), *passed_on) or 0


def _find(words: list[str]) -> tuple[Command, list[str]]:
    for command in COMMANDS:
        parts = command.words.split()
        if words[: len(parts)] == parts:
            return command, words[len(parts) :]
    group = [c for c in COMMANDS if c.words.startswith(words[0] + " ")]
    if group and (len(words) == 1 or words[1] in _HELP):
        raise _Shown(_help(group))
    known = [command.words for command in COMMANDS]
    given = " ".join(words[:2] if group else words[:1])
    near = difflib.get_close_matches(given, known, 1, 0.5)
    hint = f"did you mean `meshlm {near[0]}`?" if near else "see `meshlm --help`"
    raise UsageError(f"there is no command {given!r}: {hint}")


class _Shown(Exception):  # noqa: N818 - it ends the work, but is no error
    """Text that was asked for instead of work."""


def _help(commands: Sequence[Command] = COMMANDS) -> str:
    width = max(len(command.words) for command in commands) + 2
    lines = [f"  {command.words:<{width}}{command.summary}" for command in commands]
    return "\n".join(
        (
            "usage: meshlm COMMAND [OPTIONS]",
            "",
            "MeshLM trains, samples and evaluates GPT-J on one CPU, one GPU or a mesh of devices.",
            "",
            *lines,
            "",
            "Each command explains itself: meshlm COMMAND --help. Start with: meshlm demo",
            "--verbose with any command shows the traceback of an error; --version the version.",
        )
    )


def _guarded(work: Callable[[], int], verbose: bool) -> int:
    try:
        return work()
    except _Shown as shown:
        print(shown)
        return 0
    except MeshLMError as error:
        return _fail(str(error), error.exit_code, verbose)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, verbose)
    except BrokenPipeError:
        # The reader of our output went away: nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1, verbose)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        line = (str(error).strip() or "no reason given").split("\n")[0]
        return _fail(f"{type(error).__name__}: {line} (--verbose shows where)", 1, False)


def _fail(message: str, exit_code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    # One line and no terminal codes, whatever a path or a prompt in it may hold.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    print(f"meshlm: {line}", file=sys.stderr)
    return exit_code


def _stop(exit_code: int, number: int, frame: FrameType | None) -> Any:
    raise StoppedError("stopped by SIGTERM", exit_code)
