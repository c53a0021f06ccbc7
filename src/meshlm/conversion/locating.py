"""The folder or file that a path to weights means."""

import difflib
import itertools
import re
from pathlib import Path

from meshlm.conversion.hf.files import find_weights
from meshlm.core.errors import BadInputError, UsageError

_MOST_NAMES = 10_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def locate(path: Path) -> Path:
    """Returns the folder or file that is meant by a path.

    A safetensors file by itself stands for its folder, and a model's folder in the cache of the
    Hugging Face hub for the only snapshot in it.

    Raises:
        UsageError: there is nothing at the path, or there are several snapshots.
        BadInputError: a file is not the one that its folder's weights are read from.
    """
    if not path.exists():
        raise nothing_at(path)
    if path.is_file() and path.name.endswith((".safetensors", ".safetensors.index.json")):
        return _folder_of(path)
    snapshots = _snapshots(path)
    if len(snapshots) > 1:
        main = _text_of(path / "refs/main")
        known = f"; refs/main is {main}" if main in [s.name for s in snapshots] else ""
        raise UsageError(
            f"{path} is a model's folder in the hub's cache, with {len(snapshots)} snapshots: give "
            f"one of them, such as {snapshots[-1]}{known}"
        )
    return snapshots[0] if snapshots else path


def nothing_at(path: Path) -> UsageError:
    """Returns the error of a path where nothing is."""
    text = str(path)
    if path.is_symlink():
        why = f"it is a link to {path.readlink()}, which is not there"
    elif text.startswith("~"):
        why = "~ stands for your home folder in a shell alone: write the folder out"
    elif text.startswith(("http:", "https:", "hf:")):
        why = "MeshLM downloads nothing: download the model, and give its folder"
    elif near := _near(path):
        why = f"did you mean {near}?"
    elif _HUB_NAME.fullmatch(text) and not path.parent.exists():
        why = (
            "MeshLM downloads nothing; if it is a model on the Hugging Face hub: "
            f"hf download {text} --local-dir {path.name}, and give {path.name}"
        )
    else:
        return UsageError(f"{path}: there is nothing at this path")
    return UsageError(f"{path}: there is nothing at this path; {why}")


def _folder_of(path: Path) -> Path:
    folder = path.parent
    found = find_weights(folder)
    if found is None or path.name not in [found.path.name, *(p.name for p in found.paths)]:
        read = "nothing" if found is None else found.path.name
        raise BadInputError(
            f"{path} is not what the weights of {folder} are read from ({read} is): give the "
            "folder, or name the file model.safetensors beside a config.json"
        )
    return folder


def _snapshots(path: Path) -> list[Path]:
    """Returns the snapshots in a model's folder of the hub's cache, oldest first."""
    folder = path / "snapshots"
    if not path.name.startswith("models--") or not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if entry.is_dir()]
    return sorted(found, key=lambda entry: (entry.stat().st_mtime, entry.name))


def _near(path: Path) -> Path | None:
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in itertools.islice(path.parent.iterdir(), _MOST_NAMES)]
    near = difflib.get_close_matches(path.name, names, 1, 0.8)
    return path.parent / near[0] if near else None


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(100).decode(errors="replace").strip()
    except OSError:
        return ""
