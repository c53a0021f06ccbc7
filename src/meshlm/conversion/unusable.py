"""What lies at a path instead of weights that can be read, and what to do about it, in one line.

A sign is a function that recognises one such case by the names of files. `refuse_unusable` and
`unknown` return the error of the first sign that fits.
"""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meshlm.conversion.hf.files import SHARD, find_weights
from meshlm.core import strict_json
from meshlm.core.errors import BadInputError, MeshLMError, UsageError
from meshlm.core.lfs import is_pointer

_ADAPTER_CONFIG = "adapter_config.json"
_MAX_JSON_BYTES = 1 << 20
_MOST_NAMES = 10_000
_SHOWN = 3
_TRAINER_STEP = re.compile(r"checkpoint-(\d{1,12})")
# What a model is read from; pointers in place of other files do no harm.
_READ = ("*.json", "*.txt", "*.safetensors", "*.npz", "*.bin", "*.tar.zst", "*.tar.zstd")
# Beneath the folder itself: the shards of a step of the original's, and of several steps.
_BENEATH = ("shard_*/*.npz", "step_*/shard_*/*.npz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """The names in a folder, sorted; or a file's own name."""

    path: Path
    files: Sequence[str]
    folders: Sequence[str] = ()
    dangling: Sequence[str] = ()
    """Links that lead nowhere."""

    @classmethod
    def of(cls, path: Path) -> "Contents":
        """Returns what is at a path; of very large folders, a part."""
        if not path.is_dir():
            return cls(path=path.parent, files=[path.name])
        entries = sorted(itertools.islice(path.iterdir(), _MOST_NAMES))
        return cls(
            path=path,
            files=[entry.name for entry in entries if entry.is_file()],
            folders=[entry.name for entry in entries if entry.is_dir()],
            dangling=[e.name for e in entries if e.is_symlink() and not e.exists()],
        )

    def matching(self, *patterns: str) -> list[str]:
        """Returns the names that a pattern fits, of files and of folders."""
        names = [*self.files, *self.folders]
        return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


_Sign = Callable[[Contents], MeshLMError | None]


def refuse_unusable(path: Path) -> None:
    """Raises BadInputError where what is there only looks like weights, whatever their format."""
    contents = Contents.of(path)
    for sign in (_pointers, _adapter):
        if error := sign(contents):
            raise error


def unknown(path: Path, is_model: Callable[[Path], bool]) -> MeshLMError:
    """Returns the error of a path that holds no weights which can be read.

    Args:
        is_model: whether a folder is one that can be opened.
    """
    contents = Contents.of(path)
    for sign in _SIGNS if path.is_dir() else (_foreign,):
        if error := sign(contents):
            return error
    if path.is_dir():
        inside = [contents.path / name for name in contents.folders]
        if models := [folder for folder in inside[:100] if is_model(folder)]:
            return UsageError(f"{path} holds no weights itself: give {_listed(models)}")
    there = ", ".join([*contents.files, *contents.folders][:_SHOWN])
    return UsageError(
        f"{path} holds no weights that are known here (it has {there}): looked for a run or "
        "checkpoint of MeshLM's (checkpoints/, step_N/manifest.json, arrays/), a Hugging Face "
        "folder (config.json, model.safetensors) and a checkpoint of the original's "
        "(step_N/shard_0/0.npz, meta.json, .tar.zst)"
    )


def no_weights(folder: Path) -> MeshLMError:
    """Returns the error of a Hugging Face folder without weights."""
    return unknown(folder, lambda path: find_weights(path) is not None)


def _pointers(contents: Contents) -> MeshLMError | None:
    names = contents.matching(*_READ)
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith(".bin")]
    paths = [contents.path / name for name in names]
    for pattern in _BENEATH:
        paths += itertools.islice(contents.path.glob(pattern), _MOST_NAMES)
    pointers = [path for path in paths if is_pointer(path)]
    if not pointers:
        return None
    what = "a Git LFS pointer, not the file itself"
    if len(pointers) > 1:
        what += f", as {len(pointers) - 1} more are"
    return BadInputError(
        f"{pointers[0]} is {what}: run `git lfs pull` in {contents.path}, or download it again"
    )


def _adapter(contents: Contents) -> MeshLMError | None:
    if _ADAPTER_CONFIG not in contents.files:
        return None
    content = _json_of(contents.path / _ADAPTER_CONFIG)
    kind, base = content.get("peft_type"), content.get("base_model_name_or_path")
    return BadInputError(
        f"{contents.path} is a PEFT adapter ({str(kind or 'of unknown type')[:40]}) for "
        f"{str(base or 'a base model that it does not name')[:200]}, and no model by itself: load "
        "it with PEFT, call merge_and_unload(), and give the folder that save_pretrained writes"
    )


def _unfinished(contents: Contents) -> MeshLMError | None:
    if contents.dangling:
        return BadInputError(
            f"{contents.path / contents.dangling[0]} is a link to a file that is not there, one of "
            f"{len(contents.dangling)}: the download is not complete; download it again"
        )
    folders = [contents.path, contents.path / ".cache/huggingface/download"]
    if contents.path.parent.name == "snapshots":
        folders.append(contents.path.parent.parent / "blobs")
    for folder in folders:
        endings = ("*.incomplete", "*.part", "*.crdownload", "*.aria2")
        if folder.is_dir() and (names := Contents.of(folder).matching(*endings)):
            return BadInputError(
                f"{folder / names[0]} is a download that was not finished: download it again"
            )
    return None


def _outer_folder(contents: Contents) -> MeshLMError | None:
    path = contents.path
    models = [path / name for name in contents.matching("models--*--*")]
    if models:
        return UsageError(f"{path} is the hub's cache: give a model's folder, {_listed(models)}")
    if "snapshots" in contents.folders and contents.path.name.startswith("models--"):
        return BadInputError(f"{path / 'snapshots'} is empty: the download is not complete")
    steps = {int(m[1]): m[0] for n in contents.folders if (m := _TRAINER_STEP.fullmatch(n))}
    if steps:
        newest = path / steps[max(steps)]
        count = f", the newest of {len(steps)}" if len(steps) > 1 else ""
        return UsageError(f"{path} is the output folder of a Trainer: give {newest}{count}")
    return None


def _not_weights(contents: Contents) -> MeshLMError | None:
    path = contents.path
    if _json_of(path / "manifest.json").get("format") == "meshlm-token-store":
        return UsageError(f"{path} is a token store, which a model is trained on: give a run")
    if "run" in _json_of(path / "config.json"):
        return UsageError(f"{path} is a run without a finished checkpoint: train it first")
    return None


def _shards_alone(contents: Contents) -> MeshLMError | None:
    shards = [match for name in contents.files if (match := SHARD.fullmatch(name))]
    if not shards:
        return None
    form = "pytorch_model.bin" if shards[0][0].endswith(".bin") else "model.safetensors"
    return BadInputError(
        f"{contents.path} has {len(shards)} of {int(shards[0][2])} shards of weights and no "
        f"{form}.index.json, which says what is in each: get it too"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Foreign:
    """A form in which models lie about that cannot be read here."""

    patterns: tuple[str, ...]
    what: str
    remedy: str


_SAVE = "save it again with save_pretrained"
_FOREIGN = (
    _Foreign(
        patterns=("*.gguf", "ggml-*.bin"),
        what="GGUF, the format of llama.cpp",
        remedy="get the model in safetensors",
    ),
    _Foreign(
        patterns=("flax_model*.msgpack*",),
        what="in Flax's format",
        remedy=f"load it in transformers 4 with from_flax=True, and {_SAVE}",
    ),
    _Foreign(
        patterns=("tf_model*.h5*",),
        what="in TensorFlow's format",
        remedy=f"load it in transformers 4 with from_tf=True, and {_SAVE}",
    ),
    _Foreign(patterns=("*.onnx",), what="in ONNX's format", remedy="get the model in safetensors"),
    _Foreign(
        patterns=("zero_to_fp32.py", "global_step*", "mp_rank_*"),
        what="of a DeepSpeed checkpoint",
        remedy="run its zero_to_fp32.py, with --safe_serialization, and give the folder it writes",
    ),
    _Foreign(
        patterns=("*.distcp", "pytorch_model_fsdp_*"),
        what="of PyTorch's distributed checkpoint",
        remedy=f"load it in the program that wrote it, and {_SAVE}",
    ),
    _Foreign(
        patterns=("consolidated*",),
        what="in the form of Llama's and Mistral's own programs, which GPT-J never had",
        remedy="get the model in the form of transformers",
    ),
    _Foreign(
        patterns=("*.ckpt", "*.pt", "*.pth", "*.bin"),
        what="a pickle, a program, under a name of its own",
        remedy="if it holds GPTJForCausalLM's state dict, name it pytorch_model.bin, put the "
        "model's config.json beside it, and give the folder with --allow-pickle",
    ),
    _Foreign(
        patterns=("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar"),
        what="an archive",
        remedy="unpack it, and give the folder in it",
    ),
    _Foreign(
        patterns=("*.npz",),
        what="one file of a shard of the original's checkpoint",
        remedy="give the folder step_N that has all shards",
    ),
    _Foreign(
        patterns=("*.safetensors",),
        what="not called as transformers calls a model's weights",
        remedy="if it holds all of GPTJForCausalLM's, name it model.safetensors, beside the "
        "model's config.json",
    ),
)


def _foreign(contents: Contents) -> MeshLMError | None:
    for row in _FOREIGN:
        if names := contents.matching(*row.patterns):
            return BadInputError(f"{contents.path / names[0]} is {row.what}: {row.remedy}")
    return None


def _bare(contents: Contents) -> MeshLMError | None:
    path = contents.path
    if not contents.files and not contents.folders:
        return UsageError(f"{path} is empty: give a folder with weights in it")
    if "model_type" in _json_of(path / "config.json"):
        return UsageError(
            f"{path} has a config.json and no weights: no model.safetensors, no "
            "model.safetensors.index.json; get them too"
        )
    return None


_SIGNS: tuple[_Sign, ...] = (
    _pointers,
    _adapter,
    _unfinished,
    _outer_folder,
    _not_weights,
    _shards_alone,
    _foreign,
    _bare,
)


def _listed(paths: Sequence[Path]) -> str:
    if len(paths) == 1:
        return str(paths[0])
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"one of {', '.join(map(str, paths[:_SHOWN]))}{more}"


def _json_of(path: Path) -> dict[str, Any]:
    """Returns the object in a small file; empty where there is none."""
    try:
        return strict_json.read_object(path, max_bytes=_MAX_JSON_BYTES)
    except (OSError, BadInputError, UsageError):
        return {}
