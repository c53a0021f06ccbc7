"""What `meshlm COMMAND --help` prints."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from meshlm.cli.options import Option, options_of

_MOST_COLUMNS = 100
_MOST_NAME_COLUMNS = 30


def command_help(config: type[Any], prog: str, examples: Sequence[str]) -> str:
    """Returns how to use a command: what it does, its options, and examples."""
    options = options_of(config)
    positional = [option for option in options if option.is_positional]
    named = [option for option in options if not option.is_positional]
    needed = [_usage(option) for option in options if option.required or option.is_positional]
    usage = " ".join([f"usage: {prog}", *needed, "[OPTIONS]"])
    parts = [usage, (config.__doc__ or "").strip()]
    for title, group in (("arguments", positional), ("options", named)):
        if group:
            parts.append("\n".join([f"{title}:", *_rows(group)]))
    if examples:
        parts.append("\n".join(["examples:", *(f"  {example}" for example in examples)]))
    return "\n\n".join(parts)


def _usage(option: Option) -> str:
    if option.is_positional:
        name = option.name + ("..." if option.takes_many else "")
        return name if option.required else f"[{name}]"
    return f"{option.name} {option.value}"


def _rows(options: Sequence[Option]) -> list[str]:
    width = min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
    heads = [", ".join((*o.names[:-1], f"{o.name} {_value(o)}".strip())) for o in options]
    column = min(_MOST_NAME_COLUMNS, max(map(len, heads))) + 4
    rows = []
    for option, head in zip(options, heads, strict=True):
        note = " (required)" if option.required and not option.is_positional else ""
        default = "" if option.default is None else f" [{option.default}]"
        lines = textwrap.wrap(option.text + default + note, max(30, width - column))
        first = f"  {head:<{column - 2}}"
        rows.append(first if len(head) <= column - 4 else first.rstrip() + "\n" + " " * column)
        rows[-1] += f"\n{' ' * column}".join(lines)
    return rows


def _value(option: Option) -> str:
    return "" if option.is_positional else option.value
