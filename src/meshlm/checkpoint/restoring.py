"""Restoring onto any mesh, and finding the newest step that is worth restoring."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from meshlm.checkpoint.folder import ARRAYS_NAME, reading, step_of, step_path, steps_in
from meshlm.checkpoint.manifest import (
    ArrayInfo,
    Damage,
    read_files,
    read_manifest,
    stray_files,
    verify,
)
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.processes import share

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `restore_latest` found."""

    path: Path
    step: int
    arrays: dict[str, jax.Array]
    files: dict[str, bytes]


def restore(
    step_folder: Path,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    subset: bool = False,
    check: bool = True,
) -> dict[str, jax.Array]:
    """The arrays of a step, bit for bit, each with the sharding that `abstract` asks for.

    A sharding of None is the default device. With `subset` the checkpoint may hold more arrays than
    are asked for. `check=False` leaves out the checksums, for a caller that has just verified them.

    Raises: UsageError where there is no checkpoint; BadInputError, before anything is loaded, for
    a newer format, for damage (naming the files), or for names, shapes and dtypes that differ
    (naming the first array that does).
    """
    step_folder = step_folder.absolute()
    manifest = read_manifest(step_folder)
    _refuse_difference(step_folder, manifest.arrays, abstract, subset)
    with reading(step_folder):
        if check:
            _refuse_damage(step_folder, find_damage(step_folder))
        context = ocp.Context()
        context.pytree.loading.partial_load = subset
        try:
            with context:
                stored = {manifest.stored_name(n): x for n, x in _with_shardings(abstract).items()}
                loaded = ocp.load(str(step_folder / ARRAYS_NAME), stored)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInputError(f"checkpoint {step_folder} cannot be read: {reason}") from error
    return {name: loaded[manifest.stored_name(name)] for name in abstract}


def latest_good(folder: Path) -> Path | None:
    """The newest step whose checksums hold, or None where no step was ever saved.

    A damaged step is warned about, by the files, and passed over. A step that retention has taken
    away since it was listed has a newer one in its place.

    Raises:
        BadInputError: every step is damaged, or the newest is of a newer format.
        OSError: a file cannot be read now: that is not damage, and no older step is taken for it.
    """
    reports = []
    for step in reversed(steps_in(folder)):
        path = step_path(folder, step)
        damage = _damage_unless_gone(path)
        if damage is None:
            return latest_good(folder)
        if not damage:
            return path
        reports.append(f"{path.name}: {_summary(damage)}")
        _log.warning("checkpoint %s is damaged (%s); trying an older one", path, _summary(damage))
    if reports:
        raise BadInputError(
            f"every checkpoint in {folder} is damaged ({'; '.join(reports)}); "
            "restore one from a copy, or move the folder away to start anew"
        )
    return None


def find_damage(step_folder: Path) -> list[Damage]:
    """Returns what `verify` finds. Files that are none of a good checkpoint's are warned about."""
    damage = verify(step_folder)
    strays = [] if damage else stray_files(step_folder)
    if strays:
        _log.warning("checkpoint %s is good; %s", step_folder, describe_strays(strays))
    return damage


def describe_strays(strays: Sequence[str]) -> str:
    """Returns what is said of files in a checkpoint that are none of its own."""
    more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
    return f"not part of it, and not read: {', '.join(strays[:3])}{more}"


def _damage_unless_gone(step_folder: Path) -> list[Damage] | None:
    """Returns what `verify` finds; None where the step is no longer there."""
    try:
        damage = find_damage(step_folder)
    except (UsageError, OSError):
        if step_folder.is_dir():
            raise
        return None
    return damage if step_folder.is_dir() else None


def restore_latest(folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Restored | None:
    """The newest good step, checked once and loaded; None where no step was ever saved.

    Of several processes the first one checks, and all load the step that it has found good.

    Raises: as `latest_good` and `restore`.
    """
    good = share(
        lambda: _step_text(latest_good(folder)),
        f"looking for the newest good checkpoint in {folder}",
    )
    if not good:
        return None
    path = step_path(folder, int(good))
    return Restored(
        path=path,
        step=read_manifest(path).step,
        arrays=restore(path, abstract, check=False),
        files=read_files(path),
    )


def _step_text(step_folder: Path | None) -> str:
    return "" if step_folder is None else str(step_of(step_folder))


def _refuse_difference(
    step_folder: Path,
    stored: Mapping[str, ArrayInfo],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    subset: bool,
) -> None:
    for name in sorted(abstract if subset else stored.keys() | abstract.keys()):
        there = stored.get(name)
        wanted = None
        if name in abstract:
            leaf = abstract[name]
            wanted = ArrayInfo(shape=tuple(leaf.shape), dtype=leaf.dtype.name)
        if there != wanted:
            raise BadInputError(
                f"checkpoint {step_folder}: array {name} is {there or 'absent'} in it, and "
                f"{wanted or 'absent'} in this model; use the configuration it was saved with"
            )


def _refuse_damage(step_folder: Path, damage: list[Damage]) -> None:
    if damage:
        raise BadInputError(
            f"checkpoint {step_folder} is damaged: {_summary(damage)}; use another checkpoint"
        )


def _summary(damage: list[Damage]) -> str:
    shown = ", ".join(map(str, damage[:3]))
    return shown + (f" and {len(damage) - 3} more" if len(damage) > 3 else "")


def _with_shardings(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.ShapeDtypeStruct]:
    default = jax.config.values.get("jax_default_device") or jax.local_devices()[0]
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    sharding = SingleDeviceSharding(default)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding)
        for name, leaf in abstract.items()
    }
