"""The folder of checkpoints: names, listing, and deletes that a crash cannot make half visible.

A step that a run passed over, because it was found damaged, is moved into the folder `aside` and
never deleted for that: it goes when retention would have deleted a good one of its number.
"""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from meshlm.core.files import sync_folder

MANIFEST_NAME = "manifest.json"
ARRAYS_NAME = "arrays"
ASIDE_NAME = "aside"

_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_ASIDE = re.compile(_STEP.pattern + r"(\.[1-9][0-9]*)?")
_SAVING, _DELETED, _REPLACED = ".saving-", ".deleted-", ".replaced-"
_LEFTOVER = re.compile(rf"({re.escape(_SAVING)}|{re.escape(_DELETED)}){_ASIDE.pattern}")

_log = logging.getLogger(__name__)


def step_path(folder: Path, step: int) -> Path:
    """The folder of one step, there or not."""
    return folder / f"step_{step}"


def saving_path(folder: Path, step: int, attempt: int) -> Path:
    """Where a step is written before it is whole. The same name in every process of a run.

    Each attempt has its own: what is left of one that was given up may still be written to.
    """
    return folder / f"{_SAVING}step_{step}.{attempt}"


def step_of(path: Path) -> int | None:
    """The step that a folder's name says, or None where it is not named `step_N`."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def steps_in(folder: Path) -> list[int]:
    """Every `step_N` folder, oldest first, whether or not its manifest is still there.

    Raises:
        OSError: the folder is there and cannot be read now, which is not to be taken for empty.
    """
    return sorted(int(match[1]) for match, _ in _folders_named(folder, _STEP))


def steps_aside(folder: Path) -> list[tuple[int, Path]]:
    """Every step that was set aside, oldest first, and where it is.

    What a link under the name `aside` leads to is none of this run's.
    """
    aside = folder / ASIDE_NAME
    if not is_own_folder(aside):
        return []
    return sorted((int(match[1]), path) for match, path in _folders_named(aside, _ASIDE))


def is_own_folder(path: Path) -> bool:
    """Whether there is a folder under this very name, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _folders_named(folder: Path, name: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
    try:
        with os.scandir(folder) as entries:
            found = [(name.fullmatch(entry.name), entry) for entry in entries]
            return [
                (match, Path(entry.path)) for match, entry in found if match and _is_folder(entry)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def complete_steps(folder: Path) -> list[int]:
    """The steps that were committed, oldest first. It reads no payload: see `latest_good`."""
    return [s for s in steps_in(folder) if (step_path(folder, s) / MANIFEST_NAME).is_file()]


def latest_complete(folder: Path) -> Path | None:
    """The newest committed step's folder, or None. Its checksums are not looked at."""
    steps = complete_steps(folder)
    return step_path(folder, steps[-1]) if steps else None


def publish(folder: Path, step: int, finished: Path) -> None:
    """Gives a finished `.saving-` folder its name, in place of an older one of the same step."""
    final = step_path(folder, step)
    replaced = folder / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)
    finished.rename(final)
    sync_folder(folder)
    if replaced.exists():
        remove_tree(replaced)


def set_aside(folder: Path, path: Path) -> Path:
    """Moves what may be a checkpoint into `aside`, whatever is in it, and returns where it is."""
    aside = folder / ASIDE_NAME
    if os.path.lexists(aside) and not is_own_folder(aside):
        place = _free_name(aside)
        aside.rename(place)
        _log.warning("%s was no folder: it is now %s", aside, place)
    aside.mkdir(exist_ok=True)
    place = _free_name(aside / path.name.removeprefix(_REPLACED))
    path.rename(place)
    sync_folder(aside)
    sync_folder(folder)
    return place


def _free_name(path: Path) -> Path:
    """Returns the path, or the first of `NAME.1`, `NAME.2`, ... that nothing is at."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def delete_step(folder: Path, path: Path) -> bool:
    """True when a step was deleted; False when a reader holds it, or the system refused.

    The name goes first, so a crash leaves a leftover and never a half deleted step.

    Args:
        path: of the step, in `folder` or set aside.
    """
    doomed = folder / f"{_DELETED}{path.name}"
    try:
        with _exclusive(path):
            path.rename(doomed)
        sync_folder(path.parent)
        sync_folder(folder)
    except OSError as error:
        _log.info("checkpoint %s stays for now: %s", path, error)
        return False
    remove_tree(doomed)
    return True


def clean_leftovers(folder: Path) -> None:
    """Removes what a killed process left behind. Only for the process that owns the run folder."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_REPLACED):
            name = path.name.removeprefix(_REPLACED)
            # Killed between the two renames of `publish`: the old step is whole, so it comes back.
            if _STEP.fullmatch(name) and not (folder / name).exists():
                path.rename(folder / name)
                sync_folder(folder)
            elif _STEP.fullmatch(name):
                set_aside(folder, path)
            continue
        if _LEFTOVER.fullmatch(path.name):
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Removes a folder of ours; what cannot be removed is logged and left for the next start."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("could not remove %s: %s; delete it by hand", path, error)


@contextlib.contextmanager
def reading(step_folder: Path) -> Iterator[None]:
    """Keeps a step from being deleted by retention, in this process or another, while it is read.

    Raises: FileNotFoundError where there is no manifest.
    """
    with open(step_folder / MANIFEST_NAME, "rb") as file:
        # A file system without locks still reads well; it only loses the protection.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _exclusive(step_folder: Path) -> Iterator[None]:
    """Raises BlockingIOError while anyone reads the step."""
    try:
        file = open(step_folder / MANIFEST_NAME, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        yield  # it has no manifest, so nobody reads it
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            _log.debug("no file locks on %s", step_folder)
        yield
