"""Command lines into configuration dataclasses, and mistakes into one line.

tyro makes the options from the dataclass. Its hook for parse errors and its type of a value that is
taken as it is are private to it, so the version of tyro is pinned exactly; the tests of this module
hold what is used of it.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

import tyro
from tyro import _errors as tyro_errors
from tyro._backends._tyro_backend import _LiteralValue

from meshlm.cli.options import PARSER_CONFIG, Option, Words, check_known, options_of, sort_words
from meshlm.core.errors import UsageError

T = TypeVar("T")


def sort(config: type[T], words: Sequence[str], prog: str) -> Words:
    """Returns the words after the command `prog`, sorted by the options of `config`.

    Raises:
        UsageError: an option is unknown or has no value.
    """
    return sort_words(options_of(config), words, f"see `{prog} --help`")


def parse(config: type[T], words: Words, prog: str) -> T:
    """Returns `config` made from sorted words; those after `--` are positional ones too.

    Raises:
        UsageError: an option is unknown, missing or has a value that it cannot take.
    """
    see = f"see `{prog} --help`"
    options = options_of(config)
    # A file of options may name others.
    check_known(options, words.values, see)
    arguments: list[str] = []
    for name, given in words.values.items():
        # tyro takes such a value as it is, one that begins with a dash too.
        arguments += [name, *map(_LiteralValue, given)]
    arguments += ["--", *words.positional, *words.after]

    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        raise UsageError(_describe(event, options, words.values, see))

    with tyro_errors.on_parse_error(refuse):
        return tyro.cli(config, args=arguments, prog=prog, config=PARSER_CONFIG)


def _describe(
    event: tyro_errors.ParseErrorEvent,
    options: Sequence[Option],
    values: Mapping[str, Sequence[str]],
    see: str,
) -> str:
    if isinstance(event, tyro_errors.MissingArgs):
        missing = [_name(found.arg) for found in event.missing_arguments]
        return f"missing {' and '.join(missing)}: {see}"
    if isinstance(event, tyro_errors.InvalidChoice):
        choices = sorted(choice for choice in event.choices if choice != "None")
        near = difflib.get_close_matches(event.value, choices, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{_name(event.argument)} {event.value}: {hint}choose one of {', '.join(choices)}"
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        return f"unexpected {' '.join(event.tokens)}: {see}"
    if isinstance(event, tyro_errors.InstantiationFailure):
        return _describe_value(event, options, values)
    return f"the command line cannot be read: {see}"


def _describe_value(
    event: tyro_errors.InstantiationFailure,
    options: Sequence[Option],
    values: Mapping[str, Sequence[str]],
) -> str:
    message = " ".join(event.message.split())
    if event.argument is None:  # the dataclass itself refused, in words for a person
        return message
    name = _name(event.argument)
    wanted = {"INT": "a whole number", "FLOAT": "a number"}
    value = next((option.value for option in options if option.name == name), "")
    if value not in wanted:
        return f"{name}: {message}"
    return f"{name} {' '.join(values.get(name, ()))}: give {wanted[value]}"


def _name(argument: tyro._arguments.ArgumentDefinition) -> str:
    names = argument.lowered.name_or_flags
    return str(names[-1]) if names and names[-1].startswith("-") else _positional_name(argument)


def _positional_name(argument: tyro._arguments.ArgumentDefinition) -> str:
    return argument.field.intern_name.upper()
