"""Before a run trains: its folder, its record (new or continued), its stores and its mesh."""

from pathlib import Path

import jax

from meshlm.checkpoint.folder import ARRAYS_NAME
from meshlm.core.errors import UsageError
from meshlm.core.sharding import make_mesh
from meshlm.data.loader import parse_mixture
from meshlm.data.store import TokenStore
from meshlm.data.tokenizer import Tokenizer
from meshlm.training.config import RunConfig, StoreRecord, TrainConfig, check_batch, new_run
from meshlm.training.continuing import continued_run
from meshlm.training.lock import LOCK_NAME
from meshlm.training.memory import check_memory
from meshlm.training.origin import check_tokenizer, describe_origin, open_origin
from meshlm.training.run_folder import CONFIG_FILE, read_config
from meshlm.training.settings import read_settings

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
    others = sorted(p.name for p in run.iterdir() if p.name not in _BEFORE_CONFIG)
    if others:
        raise UsageError(
            f"--run {run} is no run and not empty (it holds {others[0]}): give another folder"
        )


def make_folder(run: Path) -> None:
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
        record = _new_run(config, records, stores[0].tokenizer)
    else:
        record = continued_run(config, before, records)
    check_batch(record, config.mesh)
    mesh = make_mesh(config.mesh)
    check_memory(record, config.mesh)
    return record, stores, mesh


def _new_run(
    config: TrainConfig, stores: tuple[StoreRecord, ...], tokenizer: Tokenizer
) -> RunConfig:
    """Returns the record of a run that begins, from scratch or from a checkpoint."""
    source = open_origin(config)
    model = None if config.config is None else read_settings(config.config)[0]
    origin = None
    if source is not None:
        check_tokenizer(str(source.path), source.tokenizer, tokenizer)
        model, origin = source.model, describe_origin(config, source)
    return new_run(
        config,
        stores,
        tokenizer.fingerprint,
        tokenizer.text_vocab_size,
        model=model,
        origin=origin,
    )
