"""What the end-to-end tests share: real text, a token store, a trained run, and ways to run."""

from __future__ import annotations

import signal
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from meshlm.cli.main import main
from meshlm.data.prepare import PrepareConfig, prepare
from runs import SMALL

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def text() -> Path:
    """Real text that every Python brings along: the source of the package json."""
    return Path(sysconfig.get_paths()["stdlib"]) / "json"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A token store of that text and of email's, with held-out documents."""
    out = tmp_path_factory.mktemp("store") / "store"
    paths = (str(text), str(text.parent / "email"))
    prepare(PrepareConfig(paths=paths, out=str(out), tokenizer="train:512", val_fraction=0.2))
    return out


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which processes share what XLA compiled: it is most of their time."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@pytest.fixture(scope="module")
def shared_compilation(compiled: dict[str, str]) -> Iterator[None]:
    """The same for what runs in this process."""
    names = {name.lower(): name for name in compiled}
    before = {name: getattr(jax.config, name) for name in names}
    for name, variable in names.items():
        value = compiled[variable]
        jax.config.update(name, int(value) if value.isdigit() else value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def meshlm(capsys: pytest.CaptureFixture[str], shared_compilation: None) -> Iterator[Main]:
    """Runs a command in this process: (exit code, stdout, stderr). Never lets a traceback by."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def run_of_10(
    tmp_path_factory: pytest.TempPathFactory, store: Path, shared_compilation: None
) -> Path:
    """A run of 10 steps with checkpoints at 4, 8 and 10. Copy it before you change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options = ("--steps", "10", "--checkpoint-every", "4", "--eval-every", "5")
    assert main(["train", *SMALL, "--data", str(store), "--run", str(run), *options]) == 0
    return run
