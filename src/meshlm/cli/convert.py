"""meshlm convert"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tyro.conf import Positional

from meshlm.conversion.convert import convert
from meshlm.conversion.opening import open_source
from meshlm.conversion.proof.certificate import CERTIFICATE_FILE, Certificate
from meshlm.conversion.source import Source
from meshlm.model.params import count_params

EXAMPLES = (
    "meshlm convert step_383500 gpt-j --to meshlm",
    "meshlm convert step_383500.tar.zstd gpt-j-hf --to hf --config gpt-j-6b",
    "meshlm convert runs/first first-hf --to hf --dtype bfloat16",
    "meshlm convert gpt-j gpt-j-original --to mtj --shards 8",
)

_PLAIN_LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Convert weights into another format, and prove that they give the same numbers."""

    source: Positional[Path]
    """A run or checkpoint, a Hugging Face folder, or a checkpoint or archive of the original's."""
    destination: Positional[Path]
    """The folder to write; there is nothing under its name until all of it has been checked."""
    to: Literal["meshlm", "hf", "mtj"]
    """The format: MeshLM's own, Hugging Face's, or the original's (Mesh Transformer JAX)."""
    shards: int = 8
    """Shards of the original's format; they must divide heads and vocabulary."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What to cast all weights to; left out, each keeps its type."""
    config: str | None = None
    """The original's JSON config, or a preset's name, where none lies beside its weights."""
    tokenizer: str | None = None
    """gpt2, a tokenizer.json or its folder, in place of the source's own."""
    allow_pickle: bool = False
    """Read a pytorch_model.bin, which is a program, with torch in a process of its own."""
    force: bool = False
    """Replace the weights at the destination, once the new ones are checked."""


def run(config: Config) -> None:
    """Prints what was read, how far the work is, and what the certificate says."""
    console = Console()
    source = open_source(
        config.source,
        config=config.config,
        tokenizer=config.tokenizer,
        allow_pickle=config.allow_pickle,
    )
    _say(console, _describe(source))
    with _Progress(console) as progress:
        certificate = convert(
            source,
            config.destination,
            to=config.to,
            shards=config.shards,
            dtype=config.dtype,
            force=config.force,
            progress=progress.update,
        )
    for line in _report(certificate, config.destination):
        _say(console, line)


def _describe(source: Source) -> str:
    dtypes = sorted({info.dtype.name for info in source.infos.values()})
    step = "" if source.step is None else f", step {source.step:,}"
    moments = ", with Adam's moments" if len(source.groups) > 1 else ""
    return (
        f"{source.path}: {_FORMATS[source.kind]}, {source.model.num_layers} layers, "
        f"{count_params(source.model):,} parameters, {' and '.join(dtypes)}{step}{moments}"
    )


_FORMATS = {"meshlm": "MeshLM", "hf": "Hugging Face", "mtj": "the original's format"}


def _report(certificate: Certificate, destination: Path) -> list[str]:
    result = "checked, but rounded" if certificate.is_lossy else "checked"
    return [
        *(f"note: {note}" for note in certificate.notes),
        f"{destination}: {result}; written in {certificate.seconds:,.0f} s",
        *(f"  {line}" for line in certificate.summary()),
        f"  every hash is in {destination / CERTIFICATE_FILE}",
    ]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Progress:
    """A bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._began_s = self._line_at_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows that so many bytes of a stage are done."""
        if stage != self._stage or self._task is None:
            self._stage, self._began_s = stage, time.monotonic()
            self._task = self._bar.add_task(stage, total=total)
        self._bar.update(self._task, completed=done)
        now_s = time.monotonic()
        if self._console.is_terminal or now_s - self._line_at_s < _PLAIN_LINE_EVERY_S:
            return
        self._line_at_s = now_s
        left_s = (now_s - self._began_s) / max(1, done) * (total - done)
        _say(
            self._console,
            f"{stage}: {done / 1e9:,.2f} of {total / 1e9:,.2f} GB, {left_s / 60:,.1f} min left",
        )
