"""What every test stands on: eight virtual CPU devices, strict JAX, repeatable hypothesis, `cli`.

The flags below go for the whole suite: JAX reads them when it starts, and one pytest process runs
many rooms. A `meshlm` that a test starts as a process gets a user's environment instead: one device
and none of these flags.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

VIRTUAL_DEVICES = 8
DEVICE_FLAG = "--xla_force_host_platform_device_count"


def device_flags(flags: str, count: int) -> str:
    """XLA_FLAGS with that many virtual CPU devices; the flag is left out for one."""
    kept = [flag for flag in flags.split() if not flag.startswith(DEVICE_FLAG)]
    return " ".join(kept if count == 1 else [*kept, f"{DEVICE_FLAG}={count}"])


# Before anything imports JAX: pytest imports this file first.
os.environ["XLA_FLAGS"] = device_flags(os.environ.get("XLA_FLAGS", ""), VIRTUAL_DEVICES)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis  # noqa: E402  (it may import numpy plugins that import JAX)

# Repeatable: a red run is red again. The long profile looks further, at new examples each time.
hypothesis.settings.register_profile("quick", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile(
    "long", max_examples=500, database=None, deadline=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# Parity tests run where torch and transformers are; elsewhere one line says that they did not.

PARITY = Path(__file__).resolve().parent / "parity"
ENGINES = PARITY.with_name("engines")
MISSING = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
NO_PARITY = f"PARITY TESTS SKIPPED: no {' and no '.join(MISSING)} here; `make test` runs them"
IN_CI = os.environ.get("CI") == "true"


def wants_parity(config: pytest.Config) -> bool:
    """Whether the paths and the marker expression of this run take in the parity tests."""
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    covered = any(path in (PARITY, *PARITY.parents) or PARITY in path.parents for path in named)
    return covered and "not parity" not in (config.getoption("markexpr") or "")


def pytest_configure(config: pytest.Config) -> None:
    # In CI a skip would be a hole that nobody sees.
    if MISSING and IN_CI and wants_parity(config):
        raise pytest.UsageError(f"CI=true, but there is no {' and no '.join(MISSING)} here")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # These files import the oracles at their top: collecting them would be an error, not a skip.
    inside = PARITY in (collection_path, *collection_path.parents)
    # `make test-engines` alone has Ray.
    engines = collection_path == ENGINES and not importlib.util.find_spec("ray")
    return True if engines or (MISSING and inside) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if MISSING and item.get_closest_marker("parity"):
        (pytest.fail if IN_CI else pytest.skip)(NO_PARITY)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in (config.getoption("markexpr") or ""):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: `make test-long` runs it"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if MISSING and wants_parity(config):
        terminalreporter.write_line(NO_PARITY, yellow=True, bold=True)


# The command line as a person has it.


@dataclass(frozen=True)
class Result:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


class CommandLine:
    """Runs `meshlm` as a process: `cli("generate", run, "--prompt", "def ")`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def __call__(
        self,
        *arguments: str | Path,
        devices: int = 1,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout_s: float = 300,
    ) -> Result:
        """The finished command's exit code and output. Raises TimeoutExpired after `timeout_s`."""
        finished = subprocess.run(
            self.command(*arguments),
            cwd=cwd or self.folder,
            env={**self.environment(devices), **(env or {})},
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Result(finished.returncode, finished.stdout, finished.stderr)

    def start(
        self,
        *arguments: str | Path,
        devices: int = 1,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """The running command, output in pipes, in its own session; killed when the test ends."""
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=cwd or self.folder,
            env={**self.environment(devices), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    @staticmethod
    def environment(devices: int = 1) -> dict[str, str]:
        """A user's environment with that many virtual devices and this Python's folder on PATH."""
        environment = dict(os.environ)
        del environment["JAX_NUMPY_RANK_PROMOTION"]
        environment["XLA_FLAGS"] = device_flags(environment["XLA_FLAGS"], devices)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return environment

    @staticmethod
    def command(*arguments: str | Path) -> list[str]:
        return [str(Path(sys.executable).with_name("meshlm")), *map(str, arguments)]


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path)
    yield command_line
    for process in command_line.started:
        process.kill()
        process.communicate()
