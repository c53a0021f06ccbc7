"""Folders of the user's own for what is run as it lies there.

Whoever can write into one, or can put another in its place, can run code as the user. So every
folder and link on the way to it is looked at, from / on, as OpenSSH does it for its keys.
"""

import errno
import os
import stat
from pathlib import Path

from meshlm.core.errors import UsageError

_MAX_LINKS = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def private_folder(name: str) -> Path | None:
    """Returns `meshlm/NAME` in the user's cache folder; None where there can be none.

    Folders that are not there yet are made with access for their owner alone.

    Raises:
        UsageError: others can write there, or put another folder in its place.

    Source: XDG Base Directory Specification 0.8: XDG_CACHE_HOME, absolute or else ignored.
    """
    base = _cache_folder()
    if base is None:
        return None
    folder = base / "meshlm" / name
    try:
        make_private(folder)
        reason = why_not_private(folder)
    except OSError:
        return None
    if reason is not None:
        raise UsageError(
            f"{folder}: others can write there, and what is there is run: {reason} (XDG_CACHE_HOME)"
        )
    return folder


def make_private(folder: Path) -> None:
    """Makes the folder and those above it that are missing, all for their owner alone.

    Nothing is made below a folder that others can write to; `why_not_private` says so then.

    Raises:
        OSError: it cannot be made.
    """
    if _why_open(folder) is not None:
        return
    for missing in (*reversed(folder.parents), folder):
        if not missing.is_dir():
            # Of `parents=True` the mode is that of the last one only.
            missing.mkdir(mode=0o700, exist_ok=True)


def why_not_private(folder: Path) -> str | None:
    """Returns how others could write to a folder or replace it, and the remedy; None: they cannot.

    Everything on the way to it, links included, must be the user's or root's. Nobody else may write
    to a folder there, but where the sticky bit keeps each user's entries his own. The folder itself
    must be the user's, and only he may write to it.

    Raises:
        OSError: it is not there, or cannot be looked at.
    """
    reason = _why_open(folder)
    if reason is not None:
        return reason
    found = folder.stat()
    if found.st_uid != os.geteuid():
        return f"{folder} is user {found.st_uid}'s: choose a folder of yours"
    if found.st_mode & _OTHERS_WRITE:
        return f"{folder} has mode {stat.S_IMODE(found.st_mode):04o}: chmod 700 it"
    return None


def _why_open(folder: Path) -> str | None:
    """Returns as `why_not_private` does for all on the way; what is not there yet is not open."""
    here, links = Path("/"), 0
    left = [*reversed(folder.absolute().parts)]  # the first is /
    while left:
        part = left.pop()
        if part == "..":
            here = here.parent
            continue
        path = here / part
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        is_link = stat.S_ISLNK(found.st_mode)
        if found.st_uid not in (0, os.geteuid()):
            kind = "link" if is_link else "folder"
            return f"{path} is a {kind} of user {found.st_uid}: choose a folder not below it"
        if is_link:
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
            left += reversed(Path(os.readlink(path)).parts)  # of an absolute one the first is /
            continue
        if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            mode = f"{stat.S_IMODE(found.st_mode):04o}"
            return f"{path} has mode {mode}: chmod go-w it, or choose a folder not below it"
        here = path
    return None


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
