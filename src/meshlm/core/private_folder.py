"""Folders of the user's own for what is run as it lies there.

Whoever can write into one can run code as the user.
"""

import os
import stat
from pathlib import Path

from meshlm.core.errors import UsageError


def private_folder(name: str) -> Path | None:
    """Returns `meshlm/NAME` in the user's cache folder; None where there can be none.

    Folders that are not there yet are made with access for their owner alone.

    Raises:
        UsageError: others can write there.

    Source: XDG Base Directory Specification 0.8: XDG_CACHE_HOME, absolute or else ignored.
    """
    base = _cache_folder()
    if base is None:
        return None
    own = (base / "meshlm", base / "meshlm" / name)
    try:
        make_private(own[-1])
        is_open = _lets_others_replace(base) or any(_is_open(folder) for folder in own)
    except OSError:
        return None
    if is_open:
        raise UsageError(
            f"{own[-1]}: others can write there, and what is there is run; "
            "it and the folders above must be yours: chmod 700 them, or set XDG_CACHE_HOME"
        )
    return own[-1]


def make_private(folder: Path) -> None:
    """Makes the folder and those above it that are missing, all for their owner alone.

    Raises:
        OSError: it cannot be made.
    """
    for missing in (*reversed(folder.parents), folder):
        if not missing.is_dir():
            # Of `parents=True` the mode is that of the last one only.
            missing.mkdir(mode=0o700, exist_ok=True)


def _cache_folder() -> Path | None:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:
        # No HOME, and no entry for the user in the system's list.
        return None
    return home / ".cache" if home.is_absolute() else None


def _lets_others_replace(base: Path) -> bool:
    """True where strangers may rename what lies there; a group's folder is the user's choice."""
    found = base.stat()
    open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    return bool(open_to_all) or found.st_uid not in (os.geteuid(), 0)


def _is_open(folder: Path) -> bool:
    # A link can be turned by its owner.
    owners = {folder.lstat().st_uid, folder.stat().st_uid}
    return owners != {os.geteuid()} or bool(folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))
