"""A run that goes on: what may not change, and what is said when it would."""

import dataclasses
from pathlib import Path
from typing import Any

from meshlm.core.config import to_dict
from meshlm.core.errors import UsageError
from meshlm.training.config import (
    RunConfig,
    StoreRecord,
    TrainConfig,
    flag,
)
from meshlm.training.new_run import RUN_OPTIONS


def continued_run(
    config: TrainConfig, record: RunConfig, stores: tuple[StoreRecord, ...]
) -> RunConfig:
    """Returns the record of a run that goes on: its own, with the steps now asked for.

    The stores may lie elsewhere than before, if they are the same.

    Raises:
        UsageError: an option is given that would change the run's past; both values are named.
    """
    then = to_dict(record)
    past = {**{name: then[name] for name in (*RUN_OPTIONS, "seq_len")}, **then["optimizer"]}
    past["optimizer"] = record.optimizer.name
    past["vocab_size"] = record.model.vocab_size
    past["recipe_shards"] = record.optimizer.bias_shares
    past |= _origin_options(record)
    for name, value in past.items():
        now = getattr(config, name, None)
        now = str(now.absolute()) if isinstance(now, Path) else now
        if name != "steps" and now is not None and now != value:
            _refuse(config.run, flag(name), value, now)
    _check_same_stores(config.run, record.data, stores)
    return dataclasses.replace(record, data=stores, steps=config.steps or record.steps)


def _origin_options(record: RunConfig) -> dict[str, str | None]:
    origin = record.origin
    goes_on = origin is not None and origin.goes_on
    path = None if origin is None else origin.path
    return {"init": None if goes_on else path, "resume_from": path if goes_on else None}


def first_difference(record: RunConfig, other: RunConfig) -> str | None:
    """Returns the path and both values of the first setting that makes two pasts differ, or None.

    Steps to do and the places of the stores make none.
    """
    return _first_difference(_past(record), _past(other), "")


def _past(record: RunConfig) -> dict[str, Any]:
    past = to_dict(record)
    del past["steps"]
    return {**past, "data": [(s.weight, s.fingerprint) for s in record.data]}


def _first_difference(one: dict[str, Any], other: dict[str, Any], prefix: str) -> str | None:
    for name, value in one.items():
        if isinstance(value, dict) and isinstance(other[name], dict):
            inner = _first_difference(value, other[name], f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif value != other[name]:
            return f"{prefix}{name} is {value} and {other[name]}"
    return None


def _check_same_stores(
    run: Path, then: tuple[StoreRecord, ...], now: tuple[StoreRecord, ...]
) -> None:
    def shown(stores: tuple[StoreRecord, ...]) -> str:
        return " ".join(f"{s.path}={s.weight:g} ({s.fingerprint[:12]})" for s in stores)

    if [(s.weight, s.fingerprint) for s in then] != [(s.weight, s.fingerprint) for s in now]:
        _refuse(run, "data", shown(then), shown(now))


def _refuse(run: Path, flag: str, then: Any, now: Any) -> None:
    raise UsageError(
        f"--{flag} was {then} in the run {run} and is {now} now: leave it as it was, "
        "or choose another --run"
    )
