"""The options of a command, read off its configuration dataclass, and its words sorted by them."""

import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from meshlm.core.errors import UsageError

PARSER_CONFIG = (tyro.conf.FlagConversionOff,)
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


def sort_words(
    options: Sequence[Option], words: Sequence[str], see: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the positional words, and the values given to each option by its name.

    A switch may stand alone or before true or false. An option that takes many values may be given
    several times. Of one that takes a single value the last one counts.

    Raises:
        UsageError: an option is unknown (the nearest one is named) or has no value.
    """
    known = {name: option for option in options for name in option.names}
    positional: list[str] = []
    values: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, attached = _lookup(known, word)
        if option is None:
            if _is_option(known, word):
                raise UsageError(_unknown(known, word, see))
            positional.append(word)
            continue
        taken = [attached] if attached is not None else _take(option, known, rest, see)
        before = values.get(option.name, []) if option.takes_many else []
        values[option.name] = before + taken
    return positional, values


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


def _take(option: Option, known: dict[str, Option], rest: list[str], see: str) -> list[str]:
    if not option.value:
        explicit = bool(rest) and rest[0].lower() in _BOOLEANS
        return [_BOOLEANS[rest.pop(0).lower()] if explicit else "True"]
    if option.takes_many:
        taken = []
        while rest and not _is_option(known, rest[0]):
            taken.append(rest.pop(0))
    else:
        # A single value may begin with a dash, as a prompt does now and then.
        taken = [] if not rest or _lookup(known, rest[0])[0] else [rest.pop(0)]
    if not taken:
        raise UsageError(f"{option.name} has no value: {see}")
    return taken


def _unknown(known: dict[str, Option], word: str, see: str) -> str:
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, known, 1, 0.5) if len(name) > 2 else []
    return f"unknown option {name}: " + (f"did you mean {near[0]}?" if near else see)
