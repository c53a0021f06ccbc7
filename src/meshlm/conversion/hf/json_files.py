"""The small JSON files of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError

MAX_JSON_BYTES = 4 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a small JSON file.

    Raises:
        UsageError: there is no such file.
        BadInputError: it is too large, or not an object whose keys occur once.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        # transformers writes NaN and Infinity: a setting that has one is named, or is of no effect.
        return strict_json.read_object(
            path, max_bytes=MAX_JSON_BYTES, remedy="get the file again", not_finite=float
        )
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror})") from None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file for people to read too."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    files.write_new(path, f"{text}\n".encode())


def bad_config(path: Path, why: str) -> BadInputError:
    return BadInputError(f"{path}: {why}")


def show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
