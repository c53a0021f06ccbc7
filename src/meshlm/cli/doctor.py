"""meshlm doctor"""

import json
from dataclasses import dataclass

from meshlm.doctor import diagnose, render

EXAMPLES = (
    "meshlm doctor",
    "meshlm doctor --json",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tell what this machine and this installation can do, and what is in the way."""

    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Prints the diagnosis; 1 where something is in the way."""
    diagnosis = diagnose()
    text = (
        json.dumps(diagnosis.to_dict(), indent=2, allow_nan=False) + "\n"
        if config.json
        else render(diagnosis)
    )
    print(text, end="")
    return diagnosis.exit_code
