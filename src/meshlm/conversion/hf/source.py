"""A Hugging Face folder of GPT-J's weights, opened and checked against its own config."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meshlm.conversion.finite import Place
from meshlm.conversion.hf import gptj, pickled
from meshlm.conversion.hf import names as hf_names
from meshlm.conversion.hf.config import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    HfConfig,
    read_config,
    read_generation_config,
    read_json,
)
from meshlm.conversion.hf.files import find_weights, has_weights
from meshlm.conversion.hf.tokenizer import CHAT_TEMPLATE_FILE, tokenizer_of
from meshlm.conversion.parts import PartKey, native_shapes, part_keys
from meshlm.conversion.source import Group, Part, Source
from meshlm.conversion.unusable import no_weights
from meshlm.core.errors import BadInputError, UsageError
from meshlm.data.special_tokens import SpecialTokens, fits, rowless_note
from meshlm.data.tokenizer import Tokenizer
from meshlm.data.tokenizer_folder import TOKENIZER_CONFIG, ReadTokenizer
from meshlm.formats.safetensors import Tensors, open_tensors
from meshlm.formats.tensor import DTYPES, TensorInfo
from meshlm.model.config import ModelConfig

_log = logging.getLogger(__name__)


# By numpy's kind of a dtype: of floating-point numbers, those that are too wide.
_REMEDIES = {
    "f": "load the model in torch and save it in float32: model.float().save_pretrained(FOLDER)",
    "i": "it is quantised: get the model as it was before, and give --quantize int8 here",
    "u": "it is quantised: get the model as it was before, and give --quantize int8 here",
}


class _Home(NamedTuple):
    """Where a tensor is."""

    file: Path
    """The name that messages give the file."""
    tensors: Tensors
    name: str
    """In that file."""


class HfSource(Source):
    """The weights of a Hugging Face folder, whose files stay open."""

    kind = "hf"
    groups: tuple[Group, ...] = ("params",)
    step = shards = sidecar = None

    def __init__(
        self,
        path: Path,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        files: Mapping[Path, Tensors],
        special_tokens: SpecialTokens,
        left_out: Sequence[str] = (),
    ) -> None:
        """Args: files: the tensors of each file, by the name that messages give it.

        Raises:
            BadInputError: a tensor is unknown, missing, there twice, or of another shape or dtype.
        """
        self.path, self.model, self.tokenizer = path, model, tokenizer
        self.special_tokens, self.left_out = special_tokens, left_out
        self.counts: Mapping[str, int] = {}
        self._homes = _find_homes(path, model, files)
        self._infos = {
            name: info
            for key in part_keys(model)
            for name, info in _HfPart(self, key).tensors.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def parts(
        self, group: Group = "params", order: Sequence[PartKey] | None = None
    ) -> Iterator[Part]:
        if group not in self.groups:
            raise UsageError(f"{self.path}: a Hugging Face folder has no optimizer state")
        for key in order or part_keys(self.model):
            yield _HfPart(self, key)

    def read_raw(self, name: str) -> np.ndarray:
        """Returns a tensor by transformers' name, as its file has it."""
        home = self._homes[name]
        return home.tensors.read(home.name)

    def place(self, name: str) -> Place:
        """Returns where a tensor lies, by transformers' name."""
        home = self._homes[name]
        return Place(f"{home.file}: {home.name}", self.info(name).shape)

    def info(self, name: str) -> TensorInfo:
        """Returns shape and dtype of a tensor in its file, by transformers' name."""
        home = self._homes[name]
        return home.tensors.infos[home.name]


class _HfPart(Part):
    def __init__(self, source: HfSource, key: PartKey) -> None:
        self.key, self._source, self._rows = key, source, gptj.TABLE.rows(key)
        self.tensors = {
            name: TensorInfo(shape=shape, dtype=source.info(self._rows[name].outside).dtype)
            for name, shape in native_shapes(source.model, key).items()
        }
        self.raw = [self._rows[name].outside for name in self.tensors]

    def read(self, name: str) -> np.ndarray:
        row = self._rows[name]
        return row.layout.join([self.read_raw(row.outside)], self.tensors[name].shape)

    def place(self, name: str) -> Place:
        return self._source.place(self._rows[name].outside)

    def read_raw(self, name: str) -> np.ndarray:
        return self._source.read_raw(name)


def is_hf(path: Path) -> bool:
    """Whether this looks like a Hugging Face folder, of whatever model."""
    if not path.is_dir():
        return False
    if has_weights(path):
        return True
    try:
        return "model_type" in read_json(path / CONFIG_FILE)
    except (UsageError, BadInputError):
        return False


def open_hf(
    path: Path, tokenizer: ReadTokenizer | None = None, *, allow_pickle: bool = False
) -> Source:
    """Returns the weights of a Hugging Face folder.

    The tokenizer may have tokens that have no row in the model: they cannot be used.

    Args:
        tokenizer: takes the place of the folder's own.
        allow_pickle: a pytorch_model.bin may be read, with torch in a process of its own.

    Raises:
        UsageError: there are no weights; or torch is needed and not there.
        BadInputError: they are not those of a GPT-J, or damaged.
    """
    config = read_config(path / CONFIG_FILE)
    found_tokenizer = tokenizer or tokenizer_of(path, config)
    special_tokens, left_out = _declared(path, config, found_tokenizer)
    found = find_weights(path)
    if found is None:
        raise no_weights(path)
    if not found.is_pickle:
        files = {file: open_tensors(file) for file in found.paths}
    elif allow_pickle:
        with pickled.as_safetensors(found.paths) as made:
            files = {file: open_tensors(own) for file, own in zip(found.paths, made, strict=True)}
    else:
        raise BadInputError(
            f"{found.path}: these weights are a pickle, a program that could do anything: get "
            "the model's safetensors files, or trust it with --allow-pickle"
        )
    found.check(files)
    own = None if found_tokenizer is None else found_tokenizer.tokenizer
    return HfSource(path, config.model, own, files, special_tokens, left_out)


def _declared(
    path: Path, config: HfConfig, tokenizer: ReadTokenizer | None
) -> tuple[SpecialTokens, list[str]]:
    """Returns the special tokens of the folder's files, and lines on what cannot be carried."""
    special_tokens, settings = read_generation_config(path, config.special_tokens)
    left_out = []
    if tokenizer is None:
        special_tokens = dataclasses.replace(special_tokens, mode="parse")
    else:
        own, rows = tokenizer.tokenizer, config.model.vocab_size
        if not fits(own, rows):
            raise BadInputError(
                f"{path}: the tokenizer has {own.vocab_size} tokens, and the model has rows for "
                f"{rows} only (vocab_size in {CONFIG_FILE})"
            )
        special_tokens = special_tokens.with_tokenizer(tokenizer.special_tokens)
        left_out += rowless_note(own, rows)
    if settings:
        left_out.append(
            f"{GENERATION_CONFIG_FILE}: {', '.join(settings)} are left out: give such settings "
            "with each request"
        )
    if (path / CHAT_TEMPLATE_FILE).exists() or "chat_template" in _tokenizer_config(path):
        left_out.append("the chat template is left out: MeshLM's chats have one of their own")
    return special_tokens, left_out


def _tokenizer_config(path: Path) -> Mapping[str, object]:
    return read_json(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).is_file() else {}


def _find_homes(path: Path, model: ModelConfig, files: Mapping[Path, Tensors]) -> dict[str, _Home]:
    """Returns where each tensor is, by transformers' name."""
    count = sum(len(tensors.infos) for tensors in files.values())
    # Before the names are made: a config can ask for more layers than there are tensors.
    if model.num_layers > count:
        raise BadInputError(f"{path}: {count} tensors for {model.num_layers} layers (n_layer)")
    wanted = {
        row.outside: shape
        for key in part_keys(model)
        for row, shape in gptj.TABLE.shapes(model, key)
    }
    prefix, wrappers = hf_names.wrapper_of([n for t in files.values() for n in t.infos])
    if wrappers:
        _log.warning(
            "%s: all names of tensors begin with %s, as %s saves them; they are read without it",
            *(path, prefix, " in ".join(wrappers)),
        )
    homes: dict[str, _Home] = {}
    for file, tensors in files.items():
        for own_name, info in tensors.infos.items():
            name = hf_names.full_name(own_name.removeprefix(prefix))
            if gptj.is_buffer(name, model.num_layers):
                continue
            if name not in wanted:
                raise BadInputError(
                    f"{file}: {own_name} is no tensor of a GPT-J of {model.num_layers} layers"
                    f"{hf_names.why_unknown(own_name)}"
                )
            if name in homes:
                raise BadInputError(f"{file}: {own_name} is there twice")
            _check_tensor(file, own_name, info, wanted[name])
            homes[name] = _Home(file, tensors, own_name)
    missing = [name for name in wanted if name not in homes]
    if missing:
        raise _missing(path, missing)
    return homes


def _check_tensor(file: Path, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise BadInputError(
            f"{file}: {name} is {list(info.shape)}, and {list(shape)} by {CONFIG_FILE}"
        )
    if info.dtype not in DTYPES.values():
        raise BadInputError(
            f"{file}: {name} is {info.dtype.name}: weights are {', '.join(DTYPES)} here; "
            f"{_REMEDIES.get(info.dtype.kind, 'get the model again')}"
        )


def _missing(path: Path, names: Sequence[str]) -> BadInputError:
    if all(name.startswith(gptj.HEAD_PREFIX) for name in names):
        return BadInputError(
            f"{path}: {names[0]} is missing: this was saved from a model without its head; save "
            "it from GPTJForCausalLM"
        )
    return BadInputError(
        f"{path}: {names[0]} is missing, one of {len(names)} tensors; get it again"
    )
