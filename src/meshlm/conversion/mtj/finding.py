"""Where a checkpoint of the original's lies at a path, and which config goes with it."""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from meshlm.conversion.mtj.config import (
    MAX_CONFIG_BYTES,
    OldConfig,
    looks_like_old_config,
    parse_old_config,
)
from meshlm.core import files, strict_json
from meshlm.core.errors import BadInputError, UsageError

META_NAME = "meta.json"
ARCHIVE_SUFFIXES = (".tar.zst", ".tar.zstd")
_STEP_FOLDER = re.compile(r"step_(0|[1-9]\d{0,11})")
_LEVELS_ABOVE = 2
_MOST_JSON_FILES = 1000


def is_archive(path: Path) -> bool:
    """Tells whether a path is named as the published checkpoints are."""
    return path.name.endswith(ARCHIVE_SUFFIXES)


def step_of_name(name: str) -> int | None:
    """Returns the number in the name of a step's folder, or None for another name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def is_step_folder(path: Path) -> bool:
    """Tells whether a folder has a shard in it."""
    return (path / "shard_0").is_dir() or any(path.glob("shard_*"))


def lists_steps(path: Path) -> bool:
    """Tells whether a folder has the original's list of its checkpoints."""
    return bool(_listed_steps(_read_small(path / META_NAME)))


def find_step(path: Path) -> Path:
    """Returns the step's folder at a path: itself, or the newest one that it lists.

    Raises:
        BadInputError: there is none, or not the one that is listed.
    """
    if is_step_folder(path):
        return path
    meta = path / META_NAME
    data = _read_small(meta) if meta.is_file() else None
    steps = {
        step: child
        for child in path.iterdir()
        if (step := step_of_name(child.name)) is not None and child.is_dir()
    }
    return steps[choose_step(steps.keys(), data, str(path))]


def choose_step(present: Collection[int], meta: bytes | None, where: str) -> int:
    """Returns the newest step that `meta.json` lists; without one, the only step there is.

    Raises:
        BadInputError: the listed one is not there, or several are and none is listed.
    """
    there = ", ".join(f"step_{step}" for step in sorted(present)) or "none"
    if meta is None:
        if len(present) == 1:
            return next(iter(present))
        raise BadInputError(
            f"{where}: no {META_NAME} says which step is meant; there: {there}. Give one step alone"
        )
    listed = _listed_steps(meta)
    if not listed:
        raise BadInputError(f"{where}/{META_NAME} lists no checkpoints; there: {there}")
    if listed[-1] not in present:
        raise BadInputError(
            f"{where}/{META_NAME} lists step_{listed[-1]} last, which is not there; there: "
            f"{there}. Fetch it, or give a step's folder"
        )
    return listed[-1]


ConfigFile = tuple[str, Callable[[], bytes]]
"""Its name, and what reads it."""


def config_files(*folders: Path) -> list[ConfigFile]:
    """Returns the JSON files in folders, and up to two levels above each."""
    levels: dict[Path, None] = {}
    for folder in folders:
        absolute = folder.absolute()
        levels |= dict.fromkeys([absolute, *absolute.parents[:_LEVELS_ABOVE]])
    found: list[ConfigFile] = []
    for level in levels:
        try:
            paths = sorted(level.glob("*.json"))[:_MOST_JSON_FILES]
        except OSError:
            continue
        found += [(str(path), lambda path=path: _read_small(path)) for path in paths]
    return found


def choose_config(files: Sequence[ConfigFile], where: str) -> OldConfig:
    """Returns the only config of the original's among files, given as name and how to read them.

    Files in different folders that say the same are one; in one folder they are not.

    Raises:
        BadInputError: there is none, or several.
    """
    candidates = {name: data for name, read in files if looks_like_old_config(data := read())}
    if not candidates:
        raise BadInputError(
            f"no JSON config of the original's at {where} or up to two levels above: give --config "
            "with its file or a preset"
        )
    names = list(candidates)
    several = BadInputError(
        f"several configs could be meant: {', '.join(names)}; choose one with --config"
    )
    if len({str(Path(name).parent) for name in names}) < len(names):
        raise several
    configs = [parse_old_config(data, name) for name, data in candidates.items()]
    if any(config.model != configs[0].model for config in configs):
        raise several
    return configs[0]


def _listed_steps(meta: bytes) -> list[int]:
    try:
        steps = strict_json.parse_object(meta, META_NAME).get("checkpoints")
    except strict_json.JsonError:
        return []
    return [s for s in steps if type(s) is int] if isinstance(steps, list) else []


def _read_small(path: Path) -> bytes:
    """Returns a file's bytes, or none of one that is too large to be what is looked for."""
    try:
        return files.read(path, MAX_CONFIG_BYTES)
    except (OSError, BadInputError, UsageError):
        return b""
