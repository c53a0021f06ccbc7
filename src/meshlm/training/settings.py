"""A file of options for `meshlm train`, as `meshlm convert-config` writes it.

A JSON object: `model` is a shape in full, every other key an option of `TrainConfig`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.model.config import ModelConfig
from meshlm.model.families import model_from_record
from meshlm.training.config import TrainConfig, flag

_OPTION = "--config"
_NOT_IN_A_FILE = ("config", "run")


def read_settings(path: Path) -> tuple[ModelConfig | None, dict[str, Any]]:
    """Returns (the shape, if the file has one; the options by their field's name).

    Raises:
        UsageError: there is no such file.
        BadInputError: it is no JSON object, or has a key that is no option.
    """
    try:
        data = files.read(path, strict_json.MAX_BYTES)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    remedy = "give an object of options, as meshlm convert-config writes it"
    content = strict_json.parse_object(data, f"--config {path}", remedy=remedy)
    model = content.pop("model", None)
    known = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in _NOT_IN_A_FILE]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see meshlm train --help"
            raise BadInputError(f"--config {path} has an unknown option {key!r}; {hint}")
    if model is None:
        return None, content
    return model_from_record(model, f"--config {path}: model"), content


def expand(values: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Returns a command line's values with those of its --config file where it has none.

    Args:
        values: what is given to each option, by the option's name.

    Raises:
        UsageError, BadInputError: as `read_settings`.
    """
    if _OPTION not in values:
        return dict(values)
    _, options = read_settings(Path(values[_OPTION][-1]))
    found = {
        option: texts
        for name, value in options.items()
        for option, texts in _as_words(f"--{flag(name)}", value)
        if texts
    }
    return found | dict(values)


def _as_words(option: str, value: Any) -> list[tuple[str, list[str]]]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [pair for key, v in value.items() for pair in _as_words(f"{option}.{flag(key)}", v)]
    return [(option, [str(v) for v in (value if isinstance(value, list) else [value])])]
