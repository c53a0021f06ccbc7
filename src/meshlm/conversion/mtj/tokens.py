"""Tokenizer and special tokens beside a checkpoint of the original's, which has no place for them.

The original's code has GPT-2's tokenizer built in. Where weights have another one, or special
tokens of their own, MeshLM writes two files beside `meta.json`, which the original's code passes
over.
"""

from pathlib import Path
from typing import NamedTuple

from meshlm.core import files, strict_json
from meshlm.core.config import from_dict, to_dict, to_json
from meshlm.core.errors import BadInputError
from meshlm.data.special_tokens import SpecialTokens
from meshlm.data.tokenizer import Tokenizer, from_json, load_gpt2
from meshlm.data.tokenizer_folder import TOKENIZER_FILE
from meshlm.data.tokenizer_json import MAX_FILE_BYTES
from meshlm.model.config import ModelConfig
from meshlm.model.presets import GPT2_VOCAB_SIZE

SPECIAL_TOKENS_FILE = "special_tokens.json"
_MAX_BYTES = 1 << 20


class KeptTokens(NamedTuple):
    """What lies beside a checkpoint."""

    tokenizer: Tokenizer | None
    special_tokens: SpecialTokens | None


def implied_tokenizer(model: ModelConfig) -> Tokenizer | None:
    """Returns the tokenizer of weights beside which none lies: GPT-2's, if it has rows."""
    return load_gpt2() if model.vocab_size >= GPT2_VOCAB_SIZE else None


def write_kept_tokens(
    folder: Path, tokenizer: Tokenizer | None, special_tokens: SpecialTokens, model: ModelConfig
) -> list[str]:
    """Writes what is not implied; returns a note on it."""
    implied = implied_tokenizer(model)
    is_implied = tokenizer is None or (
        implied is not None and tokenizer.fingerprint == implied.fingerprint
    )
    if is_implied and special_tokens == SpecialTokens.of(implied):
        return []
    files.write_new(folder / SPECIAL_TOKENS_FILE, to_json(to_dict(special_tokens)))
    names = SPECIAL_TOKENS_FILE
    if tokenizer is not None:
        files.write_new(folder / TOKENIZER_FILE, tokenizer.to_json())
        names = f"{TOKENIZER_FILE} and {SPECIAL_TOKENS_FILE}"
    return [f"{names} lie beside the checkpoint: the original's code does not read them"]


def read_kept_tokens(folder: Path) -> KeptTokens | None:
    """Returns what MeshLM wrote into a folder; None where it wrote nothing.

    Raises:
        BadInputError: the files are damaged.
    """
    path = folder / SPECIAL_TOKENS_FILE
    if not path.is_file():
        return None
    content = strict_json.parse_object(_read(path, _MAX_BYTES), str(path), remedy="convert again")
    special_tokens = from_dict(SpecialTokens, content, str(path))
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return KeptTokens(None, special_tokens)
    try:
        tokenizer = from_json(_read(path, MAX_FILE_BYTES), special_tokens.eos_token)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    return KeptTokens(tokenizer, special_tokens)


def _read(path: Path, most: int) -> bytes:
    try:
        return files.read(path, most)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror})") from None
