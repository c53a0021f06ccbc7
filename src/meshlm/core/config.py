"""Configuration dataclasses as JSON, written whole and read back strictly."""

import dataclasses
import difflib
import json
from typing import Any, TypeVar

import msgspec

from meshlm.core.errors import BadInputError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration dataclass as JSON values."""
    return msgspec.to_builtins(config, enc_hook=str)


def to_json(content: dict[str, Any]) -> bytes:
    """Returns JSON for a person to read, ending in a newline; ValueError for NaN and infinities."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def from_dict(cls: type[T], content: Any, where: str) -> T:
    """Returns the dataclass `cls` from JSON values.

    Raises:
        BadInputError: a key is unknown or missing, or a value is of another type; `where` is named.
    """
    if not isinstance(content, dict):
        raise BadInputError(f"{where} is {type(content).__name__}, not an object of settings")
    _refuse_unknown(cls, content, where)
    try:
        return msgspec.convert(content, cls)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{where}: {error}") from None


def _refuse_unknown(cls: Any, content: dict[str, Any], where: str) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise BadInputError(f"{where} has an unknown setting {key!r}; {hint}")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            _refuse_unknown(fields[key], value, f"{where}: {key}")
