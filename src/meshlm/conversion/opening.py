"""Weights at a path, whatever their format."""

import dataclasses
from pathlib import Path

from meshlm.conversion.hf.source import is_hf, open_hf
from meshlm.conversion.locating import locate
from meshlm.conversion.mtj.config import MAX_CONFIG_BYTES, looks_like_old_config, parse_old_config
from meshlm.conversion.mtj.source import is_mtj, open_mtj
from meshlm.conversion.native.source import CONFIG_FILE, is_native, open_native, read_model
from meshlm.conversion.proof.record import require_proof
from meshlm.conversion.source import Kind, Source
from meshlm.conversion.unusable import refuse_unusable, unknown
from meshlm.core import files, strict_json
from meshlm.core.errors import UsageError
from meshlm.core.lfs import refuse_pointer
from meshlm.core.waiting import Waiting
from meshlm.data.special_tokens import SpecialTokens, fits
from meshlm.data.tokenizer_folder import ReadTokenizer, read_tokenizer
from meshlm.data.tokenizer_json import SpecialTokenMode
from meshlm.model.config import ModelConfig
from meshlm.model.presets import PRESETS


def open_source(
    path: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    verify: bool = False,
    special_tokens: SpecialTokenMode | None = None,
) -> Source:
    """Returns the weights at a path: a run, a checkpoint, a Hugging Face folder, or the original's.

    Args:
        path: a run, a folder of checkpoints or a checkpoint of MeshLM's; a Hugging Face folder; a
            step's folder of the original's, its parent, or an archive of it.
        config: the model of a checkpoint of the original's: its JSON config, a config.json of
            MeshLM's, or a preset's name. None: what lies beside the weights.
        tokenizer: "gpt2", a tokenizer.json or its folder, in place of the source's own.
        allow_pickle: a pytorch_model.bin may be read, with torch in a process of its own.
        verify: read every byte and hold it against the certificate, or the checksums of the
            download, beside it.
        special_tokens: whether their spelling in a text becomes the token, in place of what the
            tokenizer's origin says.

    Raises:
        UsageError: there is nothing of the kind at the path, or an option does not fit it; with
            `verify`, nothing is recorded of it.
        BadInputError: the weights are damaged, or do not fit their config.
    """
    with Waiting(lambda: f"still opening {path}"):
        source = _open(locate(Path(path)), config, tokenizer, allow_pickle)
        if special_tokens is not None:
            declared = dataclasses.replace(source.special_tokens, mode=special_tokens)
            source.special_tokens = declared
        if verify:
            require_proof(source)
    return source


def _open(
    path: Path, config: str | Path | None, tokenizer: str | None, allow_pickle: bool
) -> Source:
    refuse_unusable(path)
    if config is not None:
        refuse_pointer(Path(config))
    own = None if tokenizer is None else read_tokenizer(tokenizer)
    kind = kind_of(path)
    if kind == "mtj":
        model = None if config is None else read_model_config(config)
        source = open_mtj(path, model, None if own is None else own.tokenizer)
    elif config is not None:
        raise UsageError(f"--config {config}: only the original's checkpoints need one; leave it")
    elif kind == "meshlm":
        source = open_native(path)
    elif kind == "hf":
        source = open_hf(path, own, allow_pickle=allow_pickle)
    else:
        raise unknown(path, lambda folder: kind_of(folder) is not None)
    if own is not None:
        _use_tokenizer(source, own, str(tokenizer))
    return source


def kind_of(path: Path) -> Kind | None:
    """Returns the format of what lies at a path, by its names; None where it is none of ours."""
    if is_mtj(path):
        return "mtj"
    if is_native(path):
        return "meshlm"
    return "hf" if is_hf(path) else None


def read_model_config(config: str | Path) -> ModelConfig:
    """Returns the model of a preset, of the original's JSON config, or of MeshLM's config.json.

    Raises:
        UsageError: there is neither such a file nor such a preset.
        BadInputError: the file is no config.
    """
    path = Path(config)
    if not path.is_file():
        if str(config) in PRESETS:
            return PRESETS[str(config)]
        raise UsageError(
            f"--config {config}: there is no such file, and no such preset ({', '.join(PRESETS)})"
        )
    data = files.read(path, MAX_CONFIG_BYTES)
    return (
        parse_old_config(data, str(path)).model
        if looks_like_old_config(data)
        else _read_own(data, path)
    )


def _read_own(data: bytes, path: Path) -> ModelConfig:
    content = strict_json.parse_object(data, str(path), remedy="give the original's config")
    if not {"run", "model"} & content.keys():
        # Neither: what the original's parser says of it names the missing key.
        return parse_old_config(data, str(path)).model
    return read_model({CONFIG_FILE: data}, str(path.parent))


def _use_tokenizer(source: Source, own: ReadTokenizer, name: str) -> None:
    """Puts a tokenizer in place of the source's; ids that the source's files declare stay."""
    rows = source.model.vocab_size
    if not fits(own.tokenizer, rows):
        raise UsageError(
            f"--tokenizer {name} has {own.tokenizer.vocab_size} tokens, and the model has {rows} "
            "rows: choose the one it was trained with"
        )
    declares = source.kind == "hf" or source.special_tokens != SpecialTokens.of(source.tokenizer)
    source.tokenizer = own.tokenizer
    source.special_tokens = (
        source.special_tokens.with_tokenizer(own.special_tokens)
        if declares
        else own.special_tokens.with_ids(own.tokenizer)
    )
