"""meshlm serve"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional

from meshlm.api import load_opened, plan_loading, served
from meshlm.conversion.opening import open_source
from meshlm.core.compile_cache import use_compile_cache
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig
from meshlm.data.tokenizer_json import SpecialTokenMode
from meshlm.generation.profiles import Dtype, Profile, Quantization
from meshlm.serving.config import EngineConfig, Limits
from meshlm.serving.http.fingerprint import fingerprint
from meshlm.serving.http.guards import Keys, is_loopback
from meshlm.serving.http.server import ServeOptions, serve

EXAMPLES = (
    "meshlm serve runs/first --open",
    "meshlm serve gpt-j-6b/ --dtype bfloat16 --slots 16 --model-id gpt-j-6b",
    "meshlm serve runs/first --host 0.0.0.0 --api-key-file keys.txt",
    "meshlm serve runs/first --port 0 --cors-origin https://example.org",
)
_MOST_KEY_FILE_BYTES = 1 << 20
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve a model: an OpenAI-compatible API, and a page to try it at the same address."""

    path: Positional[Path]
    """A run, a checkpoint, or GPT-J's weights in any format that `meshlm convert` reads."""
    host: str = "127.0.0.1"
    """Address to listen at; one that others reach needs a key, or --insecure."""
    port: int = 8000
    """Port to listen at; 0 takes any free one."""
    api_key: tuple[str, ...] = ()
    """Keys, any of which a client sends; other users may see them in the list of processes."""
    api_key_file: Path | None = None
    """A file of such keys, one a line. MESHLM_API_KEY in the environment is another way."""
    insecure: bool = False
    """Serve an address that others reach without a key."""
    allowed_host: tuple[str, ...] = ()
    """Names that requests may be for, besides localhost; behind a proxy, the public one."""
    cors_origin: tuple[str, ...] = ()
    """Origins, such as https://example.org, whose pages may ask; * for all."""
    model_id: str | None = None
    """The model's name in the API. [the path's last part]"""
    chat_template: Literal["plain", "off"] = "plain"
    """How chats become prompts: as plain text, see the docs, or not at all."""
    open: bool = False
    """Open the page in a browser when the server is ready."""
    access_log: bool = True
    """Write a JSON line for each request to standard error."""
    compile_cache: str | None = None
    """Folder for compiled functions; "" for none. [meshlm/compiled in your cache folder]"""
    dtype: Dtype | None = None
    """Weights and products; left out, as the checkpoint stores them."""
    quantize: Quantization | None = None
    """int8: matrices in int8, for less memory and more speed on a CPU, at a small loss."""
    profile: Profile = "fast"
    """How to compute: fast, as transformers does (hf), or as the original did (mtj-2021)."""
    config: str | None = None
    """The original's JSON config or a preset, where none lies beside its weights."""
    tokenizer: str | None = None
    """gpt2, a tokenizer.json or its folder, in place of what lies beside the weights."""
    special_tokens: SpecialTokenMode | None = None
    """Whether <|endoftext|> and other special tokens in prompts become tokens (parse) or stay text.
    [parse for a Hugging Face folder or a tokenizer from a file, else text]"""
    allow_pickle: bool = False
    """Read a pytorch_model.bin, as weights alone, by torch in a process of its own."""
    verify: bool = False
    """First hold every byte against certificate.json, or the download's checksums, beside it."""
    extra_tokens: bool = False
    """Also sample the extra tokens that GPT-J's vocabulary has beyond those of text."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: Annotated[EngineConfig, OmitArgPrefixes] = field(default_factory=EngineConfig)
    limits: Annotated[Limits, OmitArgPrefixes] = field(default_factory=Limits)


def run(config: Config) -> int:
    """Serves until a signal."""
    keys = Keys(_keys(config))
    for name in config.allowed_host:
        if not _HOST_NAME.fullmatch(name):
            raise UsageError(f"--allowed-host {name}: give a name alone, such as chat.example.org")
    if not is_loopback(config.host) and not len(keys) and not config.insecure:
        raise UsageError(
            f"--host {config.host} can be reached by others: give --api-key-file FILE, "
            "or --insecure to serve everybody"
        )
    if not 0 <= config.port <= 65535:
        raise UsageError(f"--port {config.port}: give 0 to 65535")
    use_compile_cache(config.compile_cache)
    source = open_source(
        config.path,
        config=config.config,
        tokenizer=config.tokenizer,
        allow_pickle=config.allow_pickle,
        verify=config.verify,
        special_tokens=config.special_tokens,
    )
    if source.tokenizer is None:
        raise UsageError(f"{config.path} has no tokenizer: give --tokenizer gpt2 or a file")
    if config.mesh.replica * config.mesh.data > 1:
        raise UsageError(
            "--mesh.replica and --mesh.data split rows, and one server has them whole: use "
            "--mesh.model, and several servers"
        )
    opened = plan_loading(
        source,
        profile=config.profile,
        dtype=config.dtype,
        quantize=config.quantize,
        mesh=config.mesh,
    )
    options = ServeOptions(
        model_id=_model_id(config),
        fingerprint=fingerprint(config.path, config.dtype, config.quantize, config.profile),
        host=config.host,
        port=config.port,
        keys=keys,
        allowed_hosts=config.allowed_host,
        cors_origins=config.cors_origin,
        chat_template=config.chat_template == "plain",
        limits=config.limits,
        engine=config.engine,
        open_browser=config.open,
        access_log=config.access_log,
    )
    return serve(
        lambda: served(load_opened(opened, sample_extra_tokens=config.extra_tokens)), options
    )


def _model_id(config: Config) -> str:
    name = config.path.resolve().name if config.model_id is None else config.model_id
    if not name or len(name) > 200 or not name.isprintable():
        raise UsageError(f"--model-id {name!r}: give 1 to 200 visible characters")
    return name


def _keys(config: Config) -> list[str]:
    keys = [*config.api_key]
    if "MESHLM_API_KEY" in os.environ:
        keys.append(os.environ["MESHLM_API_KEY"])
    if config.api_key_file is not None:
        found = _keys_of_file(config.api_key_file)
        if not found:
            raise UsageError(f"--api-key-file {config.api_key_file}: there is no key in it")
        keys += found
    return keys


def _keys_of_file(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_KEY_FILE_BYTES)
        lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    except OSError as error:
        raise UsageError(f"--api-key-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--api-key-file {path} is not UTF-8") from None
    return [line for line in lines if line and not line.startswith("#")]
