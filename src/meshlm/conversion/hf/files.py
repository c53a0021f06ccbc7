"""Which files of a Hugging Face folder hold its weights, by transformers' names.

Where there are several, transformers' order decides: safetensors before pickles, one whole file
before an index, a plain name before a variant's. A variant (`model.fp16.safetensors`) is read where
it is the only one.

Source: transformers 5.23, modeling_utils.py, `_get_resolved_checkpoint_files` and `_add_variant`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from meshlm.conversion.hf.json_files import read_json
from meshlm.core.errors import BadInputError
from meshlm.formats.safetensors import Tensors

WEIGHTS_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

_VARIANT = r"(?:\.([A-Za-z0-9_-]{1,40}))?"
# In the order in which they are looked for.
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"model{_VARIANT}\.safetensors",
        rf"model\.safetensors\.index{_VARIANT}\.json",
        rf"pytorch_model{_VARIANT}\.bin",
        rf"pytorch_model\.bin\.index{_VARIANT}\.json",
    )
)
SHARD = re.compile(r"(?:model|pytorch_model).*-(\d{5})-of-(\d{5})(?:\..*)?\.(?:safetensors|bin)")
# A plain name in the folder itself, which nothing can lead out of it.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files of one model."""

    path: Path
    """The whole file, or the index."""
    shards: Mapping[Path, set[str]] | None
    """The names of the tensors in each, by the index; None for a whole file."""

    @property
    def paths(self) -> list[Path]:
        """The files with tensors in them."""
        return [self.path] if self.shards is None else list(self.shards)

    @property
    def is_pickle(self) -> bool:
        """Whether they are torch's."""
        return self.path.name.startswith(PICKLED_FILE.removesuffix(".bin"))

    def check(self, files: Mapping[Path, Tensors]) -> None:
        """Raises BadInputError where a shard has other tensors than the index says."""
        for file, names in (self.shards or {}).items():
            odd = sorted(names ^ files[file].infos.keys())
            if odd:
                where = "but it is not" if odd[0] in names else "but it is"
                expected = "in it" if odd[0] in names else "not in it"
                raise BadInputError(f"{file}: {odd[0]} is {expected} by {self.path.name}, {where}")


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file whose name says that it holds weights, or lists them."""
    return bool(_candidates(folder))


def find_weights(folder: Path) -> WeightFiles | None:
    """Returns the files that hold a folder's weights; None where there are none.

    Raises:
        BadInputError: there are several variants and nothing else, or an index is damaged or names
            files that are not there.
    """
    found = _candidates(folder)
    if not found:
        return None
    names = sorted(found, key=lambda name: (found[name][1] is not None, found[name][0], name))
    form, variant = found[names[0]]
    alike = [name for name in names if found[name][0] == form]
    if variant is not None and len(alike) > 1:
        raise BadInputError(
            f"{folder} has several variants of the weights, {', '.join(alike)}: keep one of them "
            f"there, or give it the name {WEIGHTS_FILE}"
        )
    path = folder / names[0]
    return WeightFiles(path=path, shards=_read_index(path) if path.suffix == ".json" else None)


def _candidates(folder: Path) -> dict[str, tuple[int, str | None]]:
    """Returns the place in `_FORMS` and the variant of each file that is called as weights are."""
    found: dict[str, tuple[int, str | None]] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        for form, pattern in enumerate(_FORMS):
            match = pattern.fullmatch(path.name)
            if match and path.is_file() and not SHARD.fullmatch(path.name):
                found[path.name] = form, match[1]
    return found


def _read_index(index: Path) -> dict[Path, set[str]]:
    """Returns the names of the tensors that an index expects in each file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{index}: it has no weight_map")
    listed: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise BadInputError(
                f"{index}: {name[:200]!r} would be in {str(file)[:200]!r}, which is no file's name"
            )
        listed.setdefault(index.parent / file, set()).add(name)
    missing = [file for file in listed if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInputError(
            f"{missing[0]}{more}: missing, {len(missing)} of the {len(listed)} files that "
            f"{index.name} names; get them again"
        )
    return listed
