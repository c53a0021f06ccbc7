"""The options of a command, read off its configuration dataclass, and its words sorted by them."""

import difflib
import re
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tyro

from meshlm.core.errors import UsageError

PARSER_CONFIG = (tyro.conf.FlagConversionOff,)
HELP, VERBOSE = ("-h", "--help"), "--verbose"
"""Options of every command."""
_END_OF_OPTIONS = "--"
_LOOKS_LIKE_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
_BOOLEANS = {"true": "True", "false": "False"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option or positional argument."""

    names: tuple[str, ...]
    """Such as ("-n", "--n"), the long one last; a positional argument has its bare name."""
    value: str
    """What to write as its value, such as INT or {a,b}; empty for a switch."""
    takes_many: bool
    text: str
    """One line that says what it is."""
    default: str | None
    """As a person would write it; None where there is none to show."""
    required: bool

    @property
    def name(self) -> str:
        """The name that messages use."""
        return self.names[-1] if self.names[-1].startswith("-") else self.names[-1].upper()

    @property
    def takes_text(self) -> bool:
        """Whether any text is a value of it, the name of an option too."""
        return self.value.startswith(("TEXT", "PATH"))

    @property
    def is_positional(self) -> bool:
        """Whether it stands for itself, without a name before it."""
        return not self.names[-1].startswith("-")


def options_of(config: type[Any]) -> list[Option]:
    """Returns the options of a command, positional arguments first, without --help."""
    with warnings.catch_warnings():
        # tyro means to take this function away; its version is pinned, and a test runs this.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(config, config=PARSER_CONFIG)
    found = [_option(action) for action in parser._actions if action.dest != "help"]
    return sorted(found, key=lambda option: not option.is_positional)


def _option(action: Any) -> Option:
    text, _, note = action.help.replace("%%", "%").rpartition(" (")
    note = note.removesuffix(")")
    default = note.removeprefix("default: ") if note.startswith("default: ") else None
    return Option(
        names=tuple(sorted(action.option_strings, key=len)) or (action.dest,),
        value=_value(action.metavar or ""),
        takes_many=action.nargs == "*",
        text=text,
        default=None if default in ("None", "", "False") else default,
        required=action.required or (action.nargs == "*" and not action.option_strings),
    )


def _value(metavar: str) -> str:
    shown = metavar.replace("{None}|", "").replace("{None,", "{")
    many = re.fullmatch(r"\{?\[+(\w+) .*", shown)
    shown = f"{many[1]} ..." if many else shown
    if shown.startswith("{"):
        shown = "{" + ",".join(sorted(shown.strip("{}").split(","))) + "}"
    return "" if shown == "{False,True}" else shown.replace("STR", "TEXT")


@dataclass
class Words:
    """The words after a command, sorted."""

    positional: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    """What is given to each option, by the option's name."""
    after: list[str] = field(default_factory=list)
    """What stands after `--`."""
    help: bool = False
    """Help is asked for; what stands after that is not read."""
    verbose: bool = False


def sort_words(options: Sequence[Option], words: Sequence[str], see: str) -> Words:
    """Returns the words sorted into arguments, options and their values.

    The word after an option that takes a text is its value, whatever it looks like. A switch may
    stand alone or before true or false. An option that takes many values may be given several
    times. Of one that takes a single value the last one counts.

    Raises:
        UsageError: an option is unknown (the nearest one is named) or has no value.
    """
    known = {name: option for option in options for name in option.names}
    found = Words()
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word in HELP:
            found.help = True
            break
        if word == VERBOSE:
            found.verbose = True
        elif word == _END_OF_OPTIONS:
            found.after = list(rest)
            break
        else:
            _sort_word(word, rest, known, found, see)
    return found


def _sort_word(
    word: str, rest: deque[str], known: dict[str, Option], found: Words, see: str
) -> None:
    option, attached = _lookup(known, word)
    if option is None:
        if _is_option(known, word):
            raise UsageError(_unknown(known, word, see))
        found.positional.append(word)
        return
    taken = [attached] if attached is not None else _take(option, known, rest, see)
    before = found.values.get(option.name, []) if option.takes_many else []
    found.values[option.name] = before + taken


def _lookup(known: dict[str, Option], word: str) -> tuple[Option | None, str | None]:
    """Returns the option that a word names, and the value after its `=`."""
    name, equals, value = word.partition("=")
    if not name.startswith("-"):
        return None, None
    option = known.get(name.replace("_", "-"))
    return option, value if equals else None


def _is_option(known: dict[str, Option], word: str) -> bool:
    name = word.partition("=")[0]
    return _lookup(known, word)[0] is not None or bool(_LOOKS_LIKE_OPTION.fullmatch(name))


def _take(option: Option, known: dict[str, Option], rest: deque[str], see: str) -> list[str]:
    """Returns the values of an option, taken from the words after it."""
    if not option.value:
        explicit = bool(rest) and rest[0].lower() in _BOOLEANS
        return [_BOOLEANS[rest.popleft().lower()] if explicit else "True"]
    # A prompt may be "--help"; no number is the name of an option.
    if not rest or (not option.takes_text and _names_option(known, rest[0])):
        raise UsageError(f"{option.name} has no value: {see}")
    taken = [rest.popleft()]
    while option.takes_many and rest and not _ends_values(known, rest[0]):
        taken.append(rest.popleft())
    return taken


def _names_option(known: dict[str, Option], word: str) -> bool:
    return word in (*HELP, VERBOSE) or _lookup(known, word)[0] is not None


def _ends_values(known: dict[str, Option], word: str) -> bool:
    return word == _END_OF_OPTIONS or _is_option(known, word)


def check_known(options: Sequence[Option], names: Iterable[str], see: str) -> None:
    """Raises UsageError, with the nearest option, where a name is none of the options'."""
    known = {name: option for option in options for name in option.names}
    for name in names:
        if name not in known:
            raise UsageError(_unknown(known, name, see))


def _unknown(known: dict[str, Option], word: str, see: str) -> str:
    name = word.partition("=")[0]
    near = [option for option in known if len(name) > 2 and option.startswith(name)]
    near = near or (difflib.get_close_matches(name, known, 1, 0.5) if len(name) > 2 else [])
    return f"unknown option {name}: " + (f"did you mean {near[0]}?" if near else see)
