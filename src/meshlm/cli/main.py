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
from meshlm.cli.options import HELP, VERBOSE, Words
from meshlm.cli.parse import parse, sort
from meshlm.core import processes
from meshlm.core.errors import MeshLMError, ReaderGoneError, StoppedError, UsageError
from meshlm.core.platform import huge_page_variables
from meshlm.core.standard_streams import StandardStreams, open_streams

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
    prints_result: bool = False
    """Standard output has what the command is for, unless it is written to --out, not messages."""


# A module is imported when its command runs, so that help and mistakes answer at once.
COMMANDS = (
    Command("demo", "demo", "train a small GPT-J on text found here, and let it write"),
    Command("data prepare", "prepare", "turn text into a token store"),
    Command("data inspect", "inspect", "show what a token store holds", prints_result=True),
    Command("train", "train", "train a model, or go on where a run stopped"),
    Command("generate", "generate", "let a model continue a prompt", prints_result=True),
    Command(
        "serve", "serve", "serve a model: an OpenAI-compatible API and a web page", stop_code=0
    ),
    Command("convert", "convert", "turn weights into another format, with a certificate"),
    Command(
        "convert-config",
        "convert_config",
        "turn the original's configuration into ours",
        prints_result=True,
    ),
    Command(
        "compare",
        "compare",
        "say how far two checkpoints or profiles are apart",
        prints_result=True,
    ),
    Command(
        "verify",
        "verify",
        "check a run, a checkpoint, weights or a token store for damage",
        prints_result=True,
    ),
    Command("launch local", "launch", "train as several processes on this machine", passes_on=True),
    Command(
        "plan",
        "plan",
        "tell what a training step needs and takes, on devices not here",
        prints_result=True,
    ),
    Command(
        "doctor",
        "doctor",
        "tell what this machine and this installation can do",
        prints_result=True,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of `meshlm ARGUMENTS...` (the process's own, unless given)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams = StandardStreams()
    if arguments is None:
        if words[:1] in _TRAINING:
            _begin_again_on_huge_pages()
        streams = open_streams()
        _print_warnings()
    invocation = _Invocation(words, streams)
    code = _guarded(invocation, lambda: invocation.verbose)
    streams.flush()
    processes.leave()
    return code


def _print_warnings() -> None:
    """Prints our own warnings as errors are, however a library has set up logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("meshlm: %(message)s"))
    logger = logging.getLogger("meshlm")
    logger.addHandler(handler)
    logger.propagate = False


def _begin_again_on_huge_pages() -> None:
    """Replaces this process by itself in the environment that training is faster in, if any is.

    The C library reads its settings when a process begins, so they cannot be changed in it.
    """
    variables = huge_page_variables()
    if variables:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


class _Invocation:
    """One call of `meshlm`: its words, and what is known of them so far."""

    def __init__(self, words: list[str], streams: StandardStreams) -> None:
        self._words, self._streams = words, streams
        self.verbose = False

    def __call__(self) -> int:
        """Returns the exit code."""
        words = self._words
        while words[:1] == [VERBOSE]:
            words = words[1:]
        if not words or words[0] in HELP:
            print(_help())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"meshlm {version('meshlm')}")
            return 0
        if group := _asked_group(words):
            print(_help(group))
            return 0
        # Until the words are sorted it is not known whether this one is an option or a value.
        self.verbose = VERBOSE in self._words
        command, rest = _find(words)
        # From the first moment on: what can be saved is saved by the command's own handler.
        signal.signal(signal.SIGTERM, functools.partial(_stop, command.stop_code))
        module = importlib.import_module(f"meshlm.cli.{command.module}")
        sorted_words = sort(module.Config, rest, f"meshlm {command.words}")
        self.verbose = sorted_words.verbose or words != self._words
        if not self.verbose:
            # Orbax logs tracebacks of what it raises again and what we then say in a line.
            logging.getLogger("absl").setLevel(logging.CRITICAL)
        return self._run(command, module, sorted_words)

    def _run(self, command: Command, module: Any, words: Words) -> int:
        prog = f"meshlm {command.words}"
        if words.help:
            print(command_help(module.Config, prog, module.EXAMPLES))
            return 0
        if hasattr(module, "expand"):
            words.values = module.expand(words.values)
        passed_on: tuple[list[str], ...] = ()
        if command.passes_on:
            passed_on, words.after = (words.after,), []
        config = parse(module.Config, words, prog)
        if command.prints_result and getattr(config, "out", None) is None:
            self._streams.expect_result()
        else:
            self._streams.expect_messages()
        return module.run(config, *passed_on) or 0


def _find(words: list[str]) -> tuple[Command, list[str]]:
    for command in COMMANDS:
        parts = command.words.split()
        if words[: len(parts)] == parts:
            return command, words[len(parts) :]
    group = _group(words)
    known = [command.words for command in COMMANDS]
    given = " ".join(words[:2] if group else words[:1])
    near = difflib.get_close_matches(given, known, 1, 0.5)
    hint = f"did you mean `meshlm {near[0]}`?" if near else "see `meshlm --help`"
    raise UsageError(f"there is no command {given!r}: {hint}")


def _asked_group(words: list[str]) -> list[Command]:
    """Returns the commands of a group, such as `data`, whose help is asked for."""
    return _group(words) if len(words) == 1 or words[1] in HELP else []


def _group(words: list[str]) -> list[Command]:
    return [command for command in COMMANDS if command.words.startswith(words[0] + " ")]


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


def _guarded(work: Callable[[], int], is_verbose: Callable[[], bool]) -> int:
    try:
        code = work()
        # A result that cannot be written is an error like any other.
        sys.stdout.flush()
        return code
    except ReaderGoneError as error:
        return error.exit_code
    except MeshLMError as error:
        return _fail(str(error), error.exit_code, is_verbose())
    except KeyboardInterrupt:
        return _fail("interrupted", 130, is_verbose())
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1, is_verbose())
    except Exception as error:
        if is_verbose():
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
