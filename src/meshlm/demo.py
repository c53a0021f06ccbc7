"""`meshlm demo`: a GPT-J trained on the Python standard library found here, in a few minutes."""

import dataclasses
import shutil
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console

from meshlm.api import Model, load, served
from meshlm.core.compile_cache import use_compile_cache
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig
from meshlm.data.prepare import PrepareConfig, prepare
from meshlm.data.store import TokenStore
from meshlm.serving.http.fingerprint import fingerprint
from meshlm.serving.http.server import ServeOptions, serve
from meshlm.training.config import RunConfig, StoreRecord, TrainConfig
from meshlm.training.loop import TrainResult, train
from meshlm.training.new_run import new_run
from meshlm.training.run_folder import read_config
from meshlm.training.speed import measure_step_s

PROMPTS = ("def is_even(i):", "class Queue:\n    def __init__(self", "import os\nimport ")
_VOCAB_SIZE = 4096
_VAL_FRACTION = 0.03
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a small GPT-J on the Python library's own source text, and let it write."""

    minutes: float = 3.0
    """Time to train, about; reading the text and compiling come on top."""
    out: Path = Path("demo")
    """Folder for the token store and the run; run again, it goes on with what is there."""
    serve: bool = False
    """Serve the model afterwards, and open its page; on a terminal it asks if not given."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 60 * 24:
            raise UsageError(f"--minutes {self.minutes:g}: give more than 0 and at most 1440")


def demo(config: DemoConfig, console: Console | None = None) -> int:
    """Makes the token store and the run in `config.out`, prints samples and what to do next.

    Then it serves the model, if that is wanted, and returns the exit code of that; else 0.
    """
    console = console or Console()
    store, run = config.out / "data", config.out / "run"
    began_s = time.monotonic()
    _say(console, f"1/4  text -> tokens: {store}")
    files = library_files()
    prepare(
        PrepareConfig(
            paths=tuple(str(path) for path in files),
            out=str(store),
            tokenizer=f"train:{_VOCAB_SIZE}",
            val_fraction=_VAL_FRACTION,
        ),
        console,
    )
    record = read_config(run)
    if record is None:
        _say(console, "2/4  measuring this machine")
        options = _options(config, store, run, console)
    else:
        _say(console, f"2/4  a run is there already: {run}")
        options = TrainConfig(run=run, data=(str(store),))
    _say(console, f"3/4  training: {run}")
    result = train(options, console)
    _say(console, "4/4  writing")
    model = load(run)
    _write_samples(model, console)
    _say_what_next(console, config, store, result, time.monotonic() - began_s)
    if config.serve or _wants_page(console):
        return _serve(run, model)
    return 0


def _wants_page(console: Console) -> bool:
    """Returns what a person at a terminal says; nobody there is a no."""
    if not (console.is_terminal and sys.stdin.isatty()):
        return False
    try:
        answer = console.input("Open its page now? It serves until Ctrl+C. \\[Y/n] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("", "y", "yes")


def _serve(run: Path, model: Model) -> int:
    use_compile_cache(None)
    options = ServeOptions(
        model_id="demo", fingerprint=fingerprint(run), port=0, open_browser=True, access_log=False
    )
    return serve(lambda: served(model), options)


def library_files() -> list[Path]:
    """Returns the `.py` files of the running Python's standard library, its tests left out.

    Raises:
        UsageError: this Python has no source text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(root).parts) and path.stat().st_size
    ]
    if not files:
        raise UsageError(
            f"no .py files in {root}: this Python comes without its source; use `meshlm data "
            "prepare` on text of your own"
        )
    return files


def _options(config: DemoConfig, store: Path, run: Path, console: Console) -> TrainConfig:
    base = TrainConfig(run=run, data=(str(store),), preset="demo", batch_size=16, seq_len=256)
    step_s = measure_step_s(_record(base, store), MeshConfig())
    steps = max(20, round(config.minutes * 60 / step_s))
    _say(console, f"     {step_s:.2f} s a step: {steps} steps in {config.minutes:g} minutes")
    interval = max(10, steps // 8)
    return dataclasses.replace(
        base,
        steps=steps,
        checkpoint_every=interval,
        eval_every=interval,
        sample_every=2 * interval,
        sample_prompts=PROMPTS,
    )


def _record(options: TrainConfig, path: Path) -> RunConfig:
    store = TokenStore.open(path)
    stores = (StoreRecord(path=str(path), weight=1.0, fingerprint=store.fingerprint),)
    return new_run(options, stores, store.tokenizer.fingerprint, store.tokenizer.vocab_size)


def _write_samples(model: Model, console: Console) -> None:
    for prompt in PROMPTS:
        (sample,) = model.generate(prompt, max_tokens=64, temperature=0.6, top_p=0.9, seed=1)
        console.rule(repr(prompt), align="left")
        console.print(prompt + sample.text, markup=False, highlight=False)
    console.rule()


def _say_what_next(
    console: Console, config: DemoConfig, store: Path, result: TrainResult, seconds: float
) -> None:
    run = result.run
    _say(
        console,
        f"A GPT-J of {result.parameters:,} parameters, {result.step:,} steps, "
        f"{seconds / 60:.1f} minutes in all.",
    )
    if result.metrics.get("val_loss") is not None:
        _say(
            console,
            f"Held-out text: loss {result.metrics['val_loss']:.3f} nats a token, "
            f"{result.metrics['val_bits_per_byte']:.3f} bits per byte.",
        )
    for what, where in (
        ("tokens", store),
        ("run", run),
        ("curves and samples", run / "report.html"),
    ):
        _say(console, f"  {what:<19}{where}")
    # Whoever comes by `make demo` has no meshlm on the PATH.
    program = "meshlm" if shutil.which("meshlm") else sys.argv[0]
    _say(console, "Try next:")
    for command in (
        f"serve {run} --open",
        f'generate {run} --prompt "def main(" --temperature 0.7',
        f"train --run {run} --steps {2 * result.step}",
        f"data inspect {store}",
        f"verify {run}",
    ):
        _say(console, f"  {program} {command}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
