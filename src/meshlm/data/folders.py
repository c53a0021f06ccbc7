"""What in a folder is bookkeeping of the program that wrote it, and not text.

Spark, Databricks and Delta put files and folders beside their data whose names begin with an
underscore. Hugging Face's `save_to_disk` writes JSON beside its Arrow files, which says which of
them are the data, and in what order.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meshlm.core import strict_json
from meshlm.core.errors import BadInputError, UsageError
from meshlm.core.files import read
from meshlm.data.names import printable

_MAX_STATE_BYTES = 64 << 20
BOOKKEEPING_FOLDERS = {
    "_delta_log": "Delta's log; parquet files that it has removed are read too: VACUUM first",
    "_temporary": "Spark's unfinished work",
    "_spark_metadata": "Spark's bookkeeping",
    "_change_data": "Delta's changes",
    "_symlink_format_manifest": "Delta's bookkeeping",
}
"""Folders that hold no data wherever they are, and what they hold."""
_MARKS = re.compile(r"_SUCCESS|_(?:committed|started)_\d+|_(?:common_)?metadata")
_TABLES = re.compile(
    r"part-\d{5}.*|.*\.(?:parquet|pq|orc|avro)(?:\.(?:gz|zst|snappy))?", re.IGNORECASE | re.DOTALL
)
_METADATA = {
    "dataset_info.json": "metadata of a Hugging Face dataset",
    "dataset_infos.json": "metadata of a Hugging Face dataset",
    "dataset_dict.json": "metadata of Hugging Face datasets; every split is read: to read one, "
    "give its folder",
}
_STATE = "state.json"
_STORE = {"manifest.json", "tokenizer.json", "train.tokens.bin"}


@dataclass
class FolderPlan:
    """How the entries of a folder are read.

    Attributes:
        reason: why none of them is read, or "".
        left_out: the entries that are not read, each with the reason.
        order: data files that come first, in this order.
    """

    reason: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def plan_folder(folder: str, names: Sequence[str]) -> FolderPlan:
    """What is read of the entries `names` of `folder`.

    Raises:
        BadInputError: a dataset of `save_to_disk` that cannot be read as its metadata says.
        UsageError: its metadata cannot be read.
    """
    plan = FolderPlan()
    if set(names) >= _STORE:
        return FolderPlan(reason="a token store of MeshLM")
    plan.left_out |= {
        name: BOOKKEEPING_FOLDERS[name] for name in names if name in BOOKKEEPING_FOLDERS
    }
    is_written = any(name in BOOKKEEPING_FOLDERS or _MARKS.fullmatch(name) for name in names)
    if is_written or any(_TABLES.fullmatch(name) for name in names):
        for name in names:
            # As Spark has it: a name with = is a partition. Two underscores are Python's.
            if name.startswith("_") and not name.startswith("__") and "=" not in name:
                plan.left_out.setdefault(name, "bookkeeping beside a table (Spark, Delta)")
    for name in names:
        if name in _METADATA:
            plan.left_out[name] = _METADATA[name]
    if _STATE in names:
        _plan_dataset(folder, names, plan)
    return plan


def _plan_dataset(folder: str, names: Sequence[str], plan: FolderPlan) -> None:
    path = os.path.join(folder, _STATE)
    if not os.path.isfile(path):
        return
    try:
        data = read(Path(path), _MAX_STATE_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: cannot read it ({error.strerror})") from None
    except BadInputError:
        return  # another program's
    try:
        state = strict_json.parse_object(data, path, remedy="get the whole dataset again")
    except strict_json.JsonError:
        if b'"_data_files"' in data:
            raise
        return  # another program's
    if "_data_files" not in state:
        return
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise BadInputError(
            f"{folder}: this dataset selects its rows by an indices mapping, which is not read: "
            "save it again with dataset.flatten_indices().save_to_disk(...)"
        )
    files = state["_data_files"]
    entries = files if isinstance(files, list) else [None]
    present, ordered = set(names), dict[str, None]()
    for entry in entries:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in present:
            raise BadInputError(
                f"{path}: names the data file {printable(str(name))}, which is not in the folder: "
                "get the whole dataset again"
            )
        ordered[name] = None
    plan.order = list(ordered)
    plan.left_out[_STATE] = _METADATA["dataset_info.json"]
    for name in names:
        if name.endswith(".arrow") and name not in ordered:
            plan.left_out[name] = f"not among the data files of {_STATE}"
