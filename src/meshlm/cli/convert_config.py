"""meshlm convert-config"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from meshlm.conversion.mtj.config import read_old_config
from meshlm.conversion.mtj.recipe import differences, to_run_config
from meshlm.core import files
from meshlm.core.config import to_json
from meshlm.core.errors import UsageError

EXAMPLES = (
    "meshlm convert-config configs/6B_roto_256.json",
    "meshlm convert-config configs/6B_roto_256.json --out 6b.json",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Turn the original's JSON config into the configuration of a run, and list what differs."""

    file: Positional[Path]
    """The original's config."""
    out: Path | None = None
    """File to write; `meshlm train --config` reads it. [printed]"""


def run(config: Config) -> None:
    """Writes the configuration, and a line for each behaviour that differs."""
    old = read_old_config(config.file)
    content = to_json(to_run_config(old))
    if config.out is None:
        print(content.decode(), end="")
    else:
        try:
            files.write_new(config.out, content)
        except FileExistsError:
            raise UsageError(f"--out {config.out} is there already: give another name") from None
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"--out {config.out}: its folder is not there; make it first"
            ) from None
    # Beside the configuration, which may be going into a file.
    where = sys.stderr if config.out is None else sys.stdout
    print("What a run of it does otherwise than the original:", file=where)
    for line in differences(old):
        print(f"- {line}", file=where)
