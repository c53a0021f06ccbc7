"""meshlm verify"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from meshlm.checkpoint import step_path, verify
from meshlm.checkpoint.folder import steps_in
from meshlm.checkpoint.manifest import MANIFEST_NAME
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.store import verify_store
from meshlm.training.run_folder import CHECKPOINTS_FOLDER, read_config

EXAMPLES = (
    "meshlm verify runs/first",
    "meshlm verify runs/first/checkpoints/step_2000",
    "meshlm verify store",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Read every byte of a run's checkpoints, a checkpoint or a token store, and check it."""

    path: Positional[Path]
    """A run, a folder of checkpoints, one checkpoint (step_N), or a token store."""


def run(config: Config) -> None:
    """Prints what is good; raises BadInputError, naming the files, where something is damaged."""
    path = config.path
    if not path.exists():
        raise UsageError(f"{path}: there is nothing at this path")
    steps = _checkpoints(path)
    if steps is None:
        verify_store(path)
        print(f"{path}: good (token store)")
        return
    if not steps:
        raise UsageError(f"{path} has no finished checkpoint to verify")
    damaged = [f"{step.name}/{d}" for step in steps for d in _verify(step)]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise BadInputError(f"{'; '.join(damaged[:3])}{more}: restore from a copy, or delete it")


def _checkpoints(path: Path) -> list[Path] | None:
    """Returns the checkpoints at a path, or None where a token store is to be looked for."""
    if (path / CHECKPOINTS_FOLDER).is_dir():
        read_config(path)
        path = path / CHECKPOINTS_FOLDER
    steps = steps_in(path)
    if steps:
        return [step_path(path, step) for step in steps]
    if path.name == CHECKPOINTS_FOLDER:
        return []
    if path.name.startswith("step_") or (path / "arrays").exists():
        return [path]
    return None if (path / MANIFEST_NAME).exists() or path.is_dir() else []


def _verify(step: Path):
    damage = verify(step)
    print(f"{step}: {f'{len(damage)} damaged' if damage else 'good'}")
    return damage
