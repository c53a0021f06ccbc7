"""meshlm verify"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from meshlm.checkpoint import describe_strays, step_path, steps_aside, stray_files, verify
from meshlm.checkpoint.folder import steps_in
from meshlm.checkpoint.manifest import MANIFEST_NAME, Damage
from meshlm.conversion.locating import locate
from meshlm.conversion.opening import kind_of, open_source
from meshlm.conversion.proof.certificate import CERTIFICATE_FILE
from meshlm.conversion.proof.record import check_all
from meshlm.conversion.unusable import unknown
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.store import UNFINISHED, verify_store
from meshlm.training.run_folder import CHECKPOINTS_FOLDER, read_config

EXAMPLES = (
    "meshlm verify runs/first",
    "meshlm verify runs/first/checkpoints/step_2000",
    "meshlm verify gpt-j-hf",
    "meshlm verify store",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Read every byte of checkpoints, weights or a token store, and check it."""

    path: Positional[Path]
    """A run, a folder of checkpoints, one checkpoint (step_N), a token store, or GPT-J's weights in
    any format that `meshlm convert` reads."""
    config: str | None = None
    """The original's JSON config or a preset, where none lies beside its weights."""
    allow_pickle: bool = False
    """Read a pytorch_model.bin, as weights alone, by torch in a process of its own."""


def run(config: Config) -> None:
    """Prints what is good.

    Raises:
        UsageError: there is nothing that can be verified, or --config does not fit it.
        BadInputError: something is damaged; the files are named.
    """
    path = locate(config.path)
    if kind_of(path) in ("hf", "mtj"):
        _verify_weights(config)
        return
    if config.config is not None:
        raise UsageError(
            f"--config {config.config}: only the original's checkpoints need one; leave it"
        )
    steps = _checkpoints(path)
    if steps is None:
        if not (path / MANIFEST_NAME).is_file() and not (path / UNFINISHED).is_dir():
            raise unknown(path, lambda folder: kind_of(folder) is not None)
        verify_store(path)
        print(f"{path}: good (token store)")
        return
    if not steps:
        raise UsageError(f"{path} has no finished checkpoint to verify")
    for _, aside in steps_aside(steps[0].parent):
        print(f"{aside}: passed over by the run and set aside; verify it by its own path")
    damaged = [f"{step.name}/{d}" for step in steps for d in _verify(step)]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise BadInputError(
            f"{'; '.join(damaged[:3])}{more}: restore it from a copy, or use another checkpoint"
        )


def _verify_weights(config: Config) -> None:
    source = open_source(config.path, config=config.config, allow_pickle=config.allow_pickle)
    proofs = check_all(source)
    if proofs:
        print(f"{config.path}: good; every byte is as recorded in {' and in '.join(proofs)}")
    else:
        print(
            f"{config.path}: readable, but not proved: its {len(source.infos)} tensors are whole, "
            f"fit their configuration and are finite; there is no {CERTIFICATE_FILE} of meshlm "
            "convert and no checksum of a download, so nothing says what the bytes should be"
        )


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


def _verify(step: Path) -> list[Damage]:
    damage = verify(step)
    strays = [] if damage else stray_files(step)
    note = f" ({describe_strays(strays)})" if strays else ""
    print(f"{step}: {f'{len(damage)} damaged' if damage else 'good'}{note}")
    return damage
