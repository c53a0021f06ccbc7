"""Command lines into configuration dataclasses, and mistakes into one line.

tyro makes the options from the dataclass. Its hook for parse errors is private to it, so the
version of tyro is pinned exactly; the tests of this module hold what is used of it.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as tyro_errors

from meshlm.core.errors import UsageError

T = TypeVar("T")


def parse(config: type[T], arguments: Sequence[str], prog: str) -> T:
    """Returns `config` made from the arguments of one command; prints help and exits if asked.

    Raises:
        UsageError: an option is unknown, missing or has a value that it cannot take.
    """
    known = option_names(config)
    arguments = list(arguments)
    unknown = [word for word in arguments if _is_unknown(word, known)]
    if unknown:
        option = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(option, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"see `{prog} --help`"
        raise UsageError(f"unknown option {option}: {hint}")
    with tyro_errors.on_parse_error(lambda event: _refuse(event, arguments)):
        return tyro.cli(config, args=arguments, prog=prog, config=(tyro.conf.FlagConversionOff,))


def option_names(config: type[Any]) -> list[str]:
    """Returns the options of a command, such as `--batch-size` and `--mesh.data`."""
    parser = tyro.extras.get_parser(config, config=(tyro.conf.FlagConversionOff,))
    names = [name for action in parser._actions for name in action.option_strings]
    return sorted(names)


def _is_unknown(word: str, known: Sequence[str]) -> bool:
    option = word.partition("=")[0].replace("_", "-")
    return option.startswith("--") and len(option) > 2 and option not in known


def _refuse(event: tyro_errors.ParseErrorEvent, arguments: Sequence[str]) -> NoReturn:
    raise UsageError(_describe(event))


def _describe(event: tyro_errors.ParseErrorEvent) -> str:
    see = f"see `{event.prog} --help`"
    if isinstance(event, tyro_errors.MissingArgs):
        names = [
            arg.arg.lowered.name_or_flags or (arg.arg.lowered.metavar,)
            for arg in event.missing_arguments
        ]
        missing = ", ".join(str(name[-1]) for name in names)
        return f"missing {missing}: {see}"
    if isinstance(event, tyro_errors.InvalidChoice):
        near = difflib.get_close_matches(event.value, event.choices, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        choices = ", ".join(event.choices)
        return f"{_name(event.argument)} {event.value}: {hint}choose one of {choices}"
    if isinstance(event, tyro_errors.BadValue):
        return f"{_name(event.argument)} has no value: {see}"
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return f"unexpected {' '.join(event.tokens)}: {see}"
    if isinstance(event, tyro_errors.InstantiationFailure):
        if event.argument is None:
            return event.message
        return f"{_name(event.argument)}: {event.message}"
    return f"the command line cannot be read: {see}"


def _name(argument: Any) -> str:
    names = argument.lowered.name_or_flags
    return str(names[-1] if names else argument.lowered.metavar)
