"""Before a run trains: its folder, its record (new or continued), its stores and its mesh."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from meshlm.checkpoint.folder import ARRAYS_NAME
from meshlm.core import files
from meshlm.core.config import from_dict, to_dict
from meshlm.core.errors import UsageError
from meshlm.core.processes import share, together
from meshlm.core.sharding import make_mesh
from meshlm.data.loader import parse_mixture
from meshlm.data.store import TokenStore
from meshlm.ops.fast_attention import AttentionName, check_attention, choose_attention
from meshlm.training.config import RunConfig, StoreRecord, TrainConfig, check_batch
from meshlm.training.continuing import continued_run, first_difference
from meshlm.training.lock import LOCK_NAME, RunLock
from meshlm.training.memory import check_memory
from meshlm.training.new_run import new_run
from meshlm.training.origin import (
    check_ids,
    check_tokenizer,
    describe_origin,
    open_origin,
    rows_needed,
    special_tokens_of,
)
from meshlm.training.run_folder import CONFIG_FILE, free_options, read_config
from meshlm.training.settings import read_settings

_FOLDER_TIMEOUT_S = 60.0  # file systems show others' files late
# What a run that was killed at its very beginning leaves.
_BEFORE_CONFIG = (LOCK_NAME, f"{CONFIG_FILE}.partial")


def refuse_foreign_folder(run: Path) -> None:
    """Raises UsageError where `run` is a file, a checkpoint, or a folder of something else."""
    if run.exists() and not run.is_dir():
        raise UsageError(f"--run {run} is a file: give a folder")
    if not run.exists():
        return
    if (run / ARRAYS_NAME).exists():
        raise UsageError(f"--run {run} is a checkpoint: give the folder of its run")
    if (run / CONFIG_FILE).exists():
        return
    names = (p.name for p in run.iterdir())
    others = sorted(n for n in names if n not in _BEFORE_CONFIG and not files.is_litter(n))
    if others:
        raise UsageError(
            f"--run {run} is no run and not empty (it holds {others[0]}): give another folder"
        )


@contextlib.contextmanager
def held_folder(config: TrainConfig) -> Iterator[None]:
    """Holds the run's folder while its block runs: the first process for all of them.

    Raises:
        UsageError: the folder is something else, or not the same one in every process.
        BusyError: another run is in it.
    """
    with contextlib.ExitStack() as held:
        run = config.run
        holder = share(lambda: _take_folder(config, held), f"opening the run's folder {run}")
        together(
            lambda: _find_folder(run, holder),
            f"waiting to see {run} as process 0 does, {_FOLDER_TIMEOUT_S:.0f} s at most",
        )
        yield


def _take_folder(config: TrainConfig, held: contextlib.ExitStack) -> str:
    """Returns what the lock says of its holder, this process."""
    refuse_foreign_folder(config.run)
    if not config.run.exists():
        resolve(config)  # so that a mistake leaves no folder behind
        _make_folder(config.run)
    held.enter_context(RunLock(config.run))
    return files.read(config.run / LOCK_NAME).decode()


def _find_folder(run: Path, holder: str) -> None:
    until_s = time.monotonic() + _FOLDER_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            if files.read(run / LOCK_NAME).decode() == holder:
                return
        if time.monotonic() > until_s:
            raise UsageError(
                f"--run {run} is not the folder that process 0 has: give a folder on a file "
                "system that all processes share"
            )
        time.sleep(0.5)


def refuse_other_options(config: TrainConfig, record: RunConfig) -> None:
    """Raises UsageError where this process was started with other options than process 0."""
    ours = {"run": to_dict(record), "options": free_options(config)}
    theirs = json.loads(share(lambda: json.dumps(ours)))
    together(lambda: _compare(record, ours["options"], theirs))


def _compare(record: RunConfig, options: dict[str, Any], theirs: dict[str, Any]) -> None:
    difference = first_difference(
        from_dict(RunConfig, theirs["run"], "process 0's command"), record
    )
    for name, value in json.loads(json.dumps(options)).items():
        if difference is None and value != theirs["options"][name]:
            difference = f"{name} is {theirs['options'][name]} and {value}"
    if difference is not None:
        raise UsageError(
            f"process 0 and another one were not started alike, {difference}: give all processes "
            "the same options and stores"
        )


def _make_folder(run: Path) -> None:
    """Makes the run's folder; raises UsageError where it cannot be made."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run {run}: {error.strerror}; give a folder that can be made") from None


def resolve(config: TrainConfig) -> tuple[RunConfig, list[TokenStore], jax.sharding.Mesh]:
    """Returns the run's record, new or continued, its opened stores, and the mesh to train on.

    Raises:
        UsageError: an option is wrong, does not fit the others, or would change the run's past.
        BadInputError: a store or the run's config.json is damaged.
    """
    before = read_config(config.run)
    if config.data is None and before is None:
        raise UsageError("--data is missing: give a token store (meshlm data prepare makes one)")
    if config.data is not None:
        mixture = parse_mixture(config.data)
    else:
        assert before is not None
        mixture = [(Path(store.path), store.weight) for store in before.data]
    stores = [TokenStore.open(path) for path, _ in mixture]
    records = tuple(
        StoreRecord(path=str(path.absolute()), weight=weight, fingerprint=store.fingerprint)
        for (path, weight), store in zip(mixture, stores, strict=True)
    )
    if before is None:
        record = _new_run(config, records, stores)
    else:
        record = continued_run(config, before, records)
    check_batch(record, config.mesh)
    mesh = make_mesh(config.mesh)
    _check_everyone_has_part(mesh)
    check_memory(record, config.mesh)
    return record, stores, mesh


def pick_attention(
    config: TrainConfig, record: RunConfig, mesh: jax.sharding.Mesh
) -> AttentionName:
    """Returns the form of attention that was asked for, or the best that these devices can do.

    Raises:
        UsageError: the one that was asked for does not compile, or processes differ in their best.
    """
    ours: AttentionName = together(lambda: _pick_alone(config, record, mesh))
    theirs = share(lambda: ours)
    together(lambda: _compare_attention(ours, theirs))
    return ours


def _compare_attention(ours: str, theirs: str) -> None:
    if ours != theirs:
        raise UsageError(
            f"attention is {theirs} by process 0's devices and {ours} by another one's: give all "
            "processes the same devices and libraries, or --attention chunked"
        )


def _pick_alone(config: TrainConfig, record: RunConfig, mesh: jax.sharding.Mesh) -> AttentionName:
    facts = {
        "length": record.seq_len,
        "head_dim": record.model.head_dim,
        "dtype": record.compute_dtype,
        "documents": record.document_mask,
    }
    if config.attention is None:
        return choose_attention(mesh, **facts)
    check_attention(config.attention, mesh, **facts)
    return config.attention


def _check_everyone_has_part(mesh: jax.sharding.Mesh) -> None:
    with_part = {device.process_index for device in mesh.devices.flat}
    without = sorted(set(range(jax.process_count())) - with_part)
    if without:
        raise UsageError(
            f"the mesh's {mesh.size} devices are none of process {', '.join(map(str, without))}: "
            f"raise --mesh.* to the {jax.device_count()} devices of all processes, or start fewer"
        )


def _new_run(
    config: TrainConfig, records: tuple[StoreRecord, ...], stores: list[TokenStore]
) -> RunConfig:
    """Returns the record of a run that begins, from scratch or from a checkpoint."""
    tokenizer, source = stores[0].tokenizer, open_origin(config)
    model = None if config.config is None else read_settings(config.config)[0]
    origin = None
    if source is not None:
        check_tokenizer(source, tokenizer)
        check_ids(source, stores)
        model, origin = source.model, describe_origin(config, source)
    return new_run(
        config,
        records,
        tokenizer.fingerprint,
        rows_needed(stores, None if source is None else source.model),
        model=model,
        origin=origin,
        special_tokens=special_tokens_of(source, stores),
    )
