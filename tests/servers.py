"""`meshlm serve` as a process, on a tiny checkpoint: for the tests that ask a real server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from conftest import CommandLine
from meshlm.checkpoint import Checkpointer
from meshlm.core.config import to_dict, to_json
from meshlm.core.tree import to_named
from meshlm.data.tokenizer import train_bpe
from meshlm.model.config import ModelConfig
from tiny import CONFIG, draw_params

TEXT = "the quick brown fox jumps over the lazy dog; the dog sleeps, and the fox runs on. " * 20
VOCAB_SIZE = 300
END_OF_TEXT = VOCAB_SIZE - 1
MODEL = dataclasses.replace(CONFIG, vocab_size=384, context_length=128)


def write_checkpoint(folder: Path, model: ModelConfig = MODEL) -> Path:
    """Writes a random model with a tokenizer of its own, and returns the path to serve.

    It never ends a text by itself: what is sampled without a seed would else be cut by chance.
    """
    tokenizer = train_bpe([TEXT], VOCAB_SIZE)
    assert tokenizer.end_of_text_id == END_OF_TEXT
    arrays = {"params." + name: a for name, a in to_named(draw_params(model)).items()}
    arrays["params.head.bias"] = arrays["params.head.bias"].at[END_OF_TEXT].set(-100.0)
    files = {
        "config.json": to_json({"run": {"model": to_dict(model)}, "options": {}}),
        "tokenizer.json": tokenizer.to_json(),
    }
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(1, arrays, files)
    return folder


class Server:
    """A running `meshlm serve`; use it in a `with`."""

    def __init__(
        self,
        checkpoint: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        turn_s: float = 0.0,
        turns: int = 0,
    ) -> None:
        """Starts it.

        Args:
            environment: more variables.
            turn_s: how much longer each turn of its engine takes.
            turns: after that many its engine fails; 0: never.
        """
        # Its output goes to files: a pipe that nobody reads would fill up.
        self._folder = tempfile.TemporaryDirectory()
        self._out = Path(self._folder.name) / "out"
        self._err = Path(self._folder.name) / "err"
        command = CommandLine.command("serve", checkpoint, "--port", "0", *options)
        if turn_s or turns:
            script = Path(__file__).with_name("faulty_meshlm.py")
            command[:1] = [sys.executable, str(script), str(turn_s), str(turns)]
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                env={**CommandLine.environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.port = 0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log that are whole."""
        return [json.loads(line) for line in self.err.splitlines(True) if line.startswith("{")]

    def wait_listening(self, timeout_s: float = 60) -> Server:
        """Returns when it has said where it answers."""
        pattern = re.compile(r"http://[^\s]+:(\d+)")
        found = self._wait(lambda: pattern.search(self.out), timeout_s)
        self.port = int(found[1])
        return self

    def wait_ready(self, timeout_s: float = 120) -> Server:
        """Returns when it takes requests."""
        self.wait_listening(timeout_s)
        self._wait(lambda: httpx.get(f"{self.url}/ready").status_code == 200, timeout_s)
        return self

    def wait_exit(self, timeout_s: float = 30) -> int:
        """Returns the exit code."""
        return self.process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def children(self) -> list[psutil.Process]:
        """Processes that it started, and theirs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def metrics(self, headers: Mapping[str, str] | None = None) -> dict[str, float]:
        """What /metrics tells: {name with its labels: number}."""
        lines = httpx.get(f"{self.url}/metrics", headers=headers).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def complete(self, **fields: Any) -> httpx.Response:
        """Asks for a completion."""
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        """A bare connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            yield connection

    def _wait(self, condition: Any, timeout_s: float) -> Any:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            with contextlib.suppress(httpx.TransportError):
                if found := condition():
                    return found
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.err}")
            time.sleep(0.05)
        raise AssertionError(f"after {timeout_s} s: {self.out}{self.err}")


def events(text: str) -> list[str]:
    """The data of a stream's events."""
    return [line[6:] for line in text.splitlines() if line.startswith("data: ")]
