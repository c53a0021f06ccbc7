"""The files of a run folder that are neither metrics nor checkpoints."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from meshlm.checkpoint.manifest import library_versions
from meshlm.core import files, strict_json
from meshlm.core.config import to_dict, to_json
from meshlm.core.platform import device_facts
from meshlm.core.processes import is_first
from meshlm.training.config import RunConfig, TrainConfig, read_run_config
from meshlm.training.report.record import INCIDENTS_FILE, SAMPLES_FOLDER

CONFIG_FILE = "config.json"
CHECKPOINTS_FOLDER = "checkpoints"


def write_config(run: Path, record: RunConfig, options: TrainConfig) -> bytes:
    """Writes config.json whole, in the first process, and returns its bytes.

    `run` is what may not change; `options` are those of this start that may; `environment` says
    where it ran.
    """
    content = to_json(
        {
            "run": to_dict(record),
            "options": free_options(options),
            "environment": _environment(),
        }
    )
    if is_first():
        files.replace(run / CONFIG_FILE, content)
    return content


_FREE_OPTIONS = (
    "mesh",
    "sharding",
    "attention",
    "remat",
    "reduce_dtype",
    "checkpoint_every",
    "keep",
    "keep_every",
    "eval_every",
    "eval_tokens",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
)


def free_options(options: TrainConfig) -> dict[str, Any]:
    """Returns the options, by name, that another start of the run may have otherwise."""
    values = to_dict(options)
    return {name: values[name] for name in _FREE_OPTIONS}


def _environment() -> dict[str, Any]:
    facts = device_facts()
    return {
        **library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": facts.kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def read_config(run: Path) -> RunConfig | None:
    """Returns the record of the run in a folder; None where there is no run.

    Raises:
        BadInputError: config.json is no run's.
    """
    path = run / CONFIG_FILE
    try:
        data = files.read(path, strict_json.MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_config(data, str(path))


def parse_config(data: bytes, where: str) -> RunConfig:
    """Returns the record in the bytes of a config.json.

    Raises:
        BadInputError: they are no run's.
    """
    remedy = "each checkpoint has a copy of it"
    return read_run_config(strict_json.parse_object(data, where, remedy=remedy), where)


def write_samples(run: Path, step: int, samples: Sequence[tuple[str, str]]) -> None:
    """Writes samples/step_N.json: pairs of prompt and continuation."""
    folder = run / SAMPLES_FOLDER
    folder.mkdir(exist_ok=True)
    content = [{"prompt": prompt, "text": text} for prompt, text in samples]
    files.replace(folder / f"step_{step}.json", to_json({"step": step, "samples": content}))


def add_incident(run: Path, step: int, kind: str, message: str) -> None:
    """Appends one line to incidents.jsonl."""
    line = json.dumps({"step": step, "kind": kind, "message": message}) + "\n"
    with files.append(run / INCIDENTS_FILE) as file:
        file.write(line.encode())
