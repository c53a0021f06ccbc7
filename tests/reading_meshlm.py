"""`meshlm` that notes each read of a token store's text: LOG ARGUMENTS..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from meshlm.cli.main import main
from meshlm.data.store import TokenStore


def note_reads(log: Path) -> None:
    """Appends a line `SPLIT START STOP` for each read."""
    read = TokenStore.read
    file = log.open("a", buffering=1)

    def noted(store: TokenStore, split: str, start: int, stop: int) -> Any:
        file.write(f"{split} {start} {stop}\n")
        return read(store, split, start, stop)

    TokenStore.read = noted


if __name__ == "__main__":
    note_reads(Path(sys.argv[1]))
    del sys.argv[1:2]
    sys.exit(main())
