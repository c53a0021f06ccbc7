"""The templates of launch/ on what they are for: Ray, SLURM, nginx and Caddy. `make test-engines`.

All of it listens on loopback, lives in temporary folders, and is ended by its process ids.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import CommandLine
from programs import Program, end_all, environment, eventually
from servers import MODEL, TEXT, write_checkpoint
from teams import free_port


@pytest.fixture(scope="session", autouse=True)
def nobody_is_left() -> Iterator[None]:
    """Ends what the tests have left running, where one has failed."""
    yield
    end_all(psutil.Process().children())


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose texts are long: a request for many tokens takes seconds."""
    size = {"num_layers": 4, "d_model": 128, "num_heads": 4, "head_dim": 32, "d_ff": 512}
    model = dataclasses.replace(MODEL, **size, rotary_dim=8, context_length=2048)
    return write_checkpoint(tmp_path_factory.mktemp("weights"), model)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for compiled functions, so that the second start takes seconds."""
    return tmp_path_factory.mktemp("compiled") / "cache"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small token store."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT * 20)
    options = ("--tokenizer", "train:300", "--val-fraction", "0")
    done = CommandLine(folder)("data", "prepare", "text.txt", "--out", "store", *options)
    assert done.returncode == 0, done.stderr
    return folder / "store"


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, dict[str, str]]]:
    """A Ray cluster of one node with two processors, and the environment that leads to it."""
    port = free_port()
    env = environment(
        RAY_ADDRESS=f"127.0.0.1:{port}",
        RAY_USAGE_STATS_ENABLED="0",
        PYTHONUNBUFFERED="1",
    )
    # Its sockets' paths have to be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = ["--head", "--block", "--port", port, "--node-ip-address", "127.0.0.1"]
        options += ["--num-cpus", 2, "--include-dashboard", "false", "--temp-dir", folder]
        options += ["--object-store-memory", 100_000_000, "--disable-usage-stats"]
        command = [Path(sys.executable).with_name("ray"), "start", *options]
        head = Program(command, tmp_path_factory.mktemp("ray") / "log", env)
        try:
            eventually(lambda: "Ray runtime started" in head.text, 120, lambda: head.text)
            yield head, env
        finally:
            head.end()
