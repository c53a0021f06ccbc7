"""What the person who started the server reads: on a terminal with a moving line, else plain."""

import sys
import time
from typing import TextIO

import jax
from rich.console import Console
from rich.status import Status

from meshlm.model.params import count_params
from meshlm.serving.config import EngineConfig
from meshlm.serving.engine import Loaded

# Between two plain lines while the model loads.
_EVERY_S = 5.0
_BYTES = {"float32": 4, "bfloat16": 2}


class Announcements:
    """Says what happens, a line each."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Writes to `stream`, or to standard output."""
        self._stream = sys.stdout if stream is None else stream
        self._started_s = time.monotonic()
        self._last_s = self._started_s - _EVERY_S
        self._status: Status | None = None

    def listening(self, name: str, url: str) -> None:
        """Says where the server answers."""
        self._say(f"MeshLM serves {name} at {url} (Ctrl-C stops)")

    def loading(self, progress: str) -> None:
        """Says what is done now; call it often."""
        if self._stream.isatty():
            if self._status is None:
                self._status = Console(file=self._stream).status("", spinner="line")
                self._status.start()
            self._status.update(progress, spinner="line")
        elif time.monotonic() - self._last_s >= _EVERY_S:
            self._last_s = time.monotonic()
            self._say(progress)

    def ready(self, name: str, loaded: Loaded, config: EngineConfig, url: str) -> None:
        """Says what is served, and how long it took to get ready."""
        seconds = time.monotonic() - self._started_s
        self._say(f"{name}: {describe(loaded, config)}")
        self._say(f"ready in {seconds:.1f} s: {url}")

    def stopping(self, samples: int, drain_s: float) -> None:
        """Says that the server ends, and what it still waits for."""
        if samples:
            plural = "" if samples == 1 else "s"
            waiting = f"{samples} sample{plural} may finish within {drain_s:g} s"
            self._say(f"stopping: {waiting}; again stops at once")
        else:
            self._say("stopping")

    def close(self) -> None:
        """Ends the moving line."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _say(self, line: str) -> None:
        self.close()
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            # Nobody reads any more; the server's work goes on.
            return


def describe(loaded: Loaded, config: EngineConfig) -> str:
    """Returns the model in words: its size, its type, and what serving takes in memory."""
    shape = loaded.model.shape
    model, dtype = shape.config, shape.compute.dtype
    is_int8 = any(leaf.dtype == "int8" for leaf in jax.tree.leaves(loaded.model.params))
    places = config.slots * model.context_length
    numbers = 2 * model.num_layers * model.num_heads * model.head_dim * places
    computing = "matrices in int8, the rest" if is_int8 else "computing"
    return (
        f"{count_params(model):,} parameters, {computing} in {dtype}, "
        f"context {model.context_length:,}; {config.slots} slots, "
        f"up to {_size(numbers * _BYTES[dtype])} of keys and values"
    )


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
