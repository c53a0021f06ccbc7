"""Training speed of MeshLM beside transformers' GPTJForCausalLM on torch, on this machine's CPU.

Both train the same shape on the same tokens: bfloat16 products over float32 weights, AdamW,
clipping by the global norm. Every contestant runs in its own interpreter and process; the processes
take turns (`--rounds`), because other work on the machine changes from minute to minute. Progress
goes to stderr. stdout gets one line of JSON: medians over all measured steps, their ratios to torch
in wall time, and in CPU time, which says more on a machine that others use too.

    .venv/bin/python bench/train.py --steps 6 --rounds 3
"""

from __future__ import annotations

import argparse
import array
import dataclasses
import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import cpu_model, positive, say

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
ADAM_B1, ADAM_B2, ADAM_EPSILON = 0.9, 0.999, 1e-8
# A model that knows nothing yet is this close to ln(vocabulary), in nats, whatever its init.
FIRST_LOSS_TOLERANCE = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained. The names are those of the command line."""

    layers: int
    d_model: int
    heads: int
    rotary_dim: int
    vocab: int
    batch_size: int
    seq_len: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def read_tokens(self, path: str) -> Any:
        """Returns the int32 tokens [steps, batch, sequence] that `write_tokens` wrote."""
        import numpy as np

        return np.fromfile(path, "<i4").reshape(self.steps, self.batch_size, self.seq_len)


# The two workers. Each yields its versions first, then the loss of every step it has finished.


def train_torch(shape: Shape, tokens_path: str) -> Iterator[dict[str, str] | float]:
    """transformers as its documentation trains: bf16 autocast, labels in, loss out, fused AdamW."""
    import torch
    import transformers

    yield {"torch": torch.__version__, "transformers": transformers.__version__}
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=shape.vocab,
            n_positions=shape.seq_len,
            n_embd=shape.d_model,
            n_layer=shape.layers,
            n_head=shape.heads,
            rotary_dim=shape.rotary_dim,
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(ADAM_B1, ADAM_B2),
        eps=ADAM_EPSILON,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    for batch in shape.read_tokens(tokens_path):
        tokens = torch.from_numpy(batch).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def train_meshlm(shape: Shape, tokens_path: str) -> Iterator[dict[str, str] | float]:
    """MeshLM's own step, with the choices that `meshlm train` makes for this shape."""
    import jax
    import numpy as np

    from meshlm.core.sharding import MeshConfig, make_mesh
    from meshlm.data.loader import Batch
    from meshlm.model.families import gpt_j
    from meshlm.optim import OptimizerConfig
    from meshlm.step import compile_train_step, init_state
    from meshlm.training.batches import to_device
    from meshlm.training.config import RunConfig

    yield {"jax": jax.__version__}
    config = RunConfig(
        preset="bench",
        model=gpt_j(
            num_layers=shape.layers,
            d_model=shape.d_model,
            num_heads=shape.heads,
            head_dim=shape.d_model // shape.heads,
            d_ff=4 * shape.d_model,
            vocab_size=shape.vocab,
            context_length=shape.seq_len,
            rotary_dim=shape.rotary_dim,
        ),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE,
            end_learning_rate=LEARNING_RATE,
            warmup_steps=0,
            anneal_steps=0,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP_NORM,
            adam_b1=ADAM_B1,
            adam_b2=ADAM_B2,
            adam_epsilon=ADAM_EPSILON,
        ),
        data=(),
        tokenizer="",
        steps=shape.steps,
        batch_size=shape.batch_size,
        seq_len=shape.seq_len,
        seed=0,
        document_mask=False,
        accumulate=1,
        z_loss=0.0,
        compute_dtype="bfloat16",
    ).step_config(None, MeshConfig())
    mesh = make_mesh(devices=jax.devices()[:1])
    # As with HF's labels, the last token of a row predicts nothing.
    loss_mask = np.ones((shape.batch_size, shape.seq_len), np.float32)
    loss_mask[:, -1] = 0
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config, 0))()
        step = compile_train_step(config)
        for tokens in shape.read_tokens(tokens_path):
            rows = Batch(tokens=tokens, targets=np.roll(tokens, -1, axis=1), loss_mask=loss_mask)
            state, metrics = step(state, to_device(rows, mesh, shape.batch_size))
            jax.block_until_ready(state)
            yield float(metrics.loss)


Worker = Callable[[Shape, str], Iterator["dict[str, str] | float"]]
WORKERS: dict[str, Worker] = {"torch": train_torch, "meshlm": train_meshlm}


def work(kind: str, shape: Shape, tokens_path: str) -> None:
    """Trains, and prints a JSON line with the versions and one for each step."""
    steps = WORKERS[kind](shape, tokens_path)
    versions = next(steps)
    assert isinstance(versions, dict)
    print(json.dumps({"python": platform.python_version(), **versions}), flush=True)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for loss in steps:
        now_s, now_cpu_s = time.perf_counter(), time.process_time()
        step = {"loss": loss, "step_s": now_s - wall_s, "cpu_s": now_cpu_s - cpu_s}
        print(json.dumps(step), flush=True)
        wall_s, cpu_s = now_s, now_cpu_s


# The harness.


@dataclasses.dataclass
class Contestant:
    """One interpreter, and what its processes measured."""

    kind: str
    python: str
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    """Added to its environment."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the latest process."""
    step_s: list[float] = dataclasses.field(default_factory=list)
    """Of the measured steps of all processes."""
    cpu_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        library = "torch" if self.kind == "torch" else "jax"
        version = self.versions.get(library)
        return f"{self.kind} ({library} {version})" if version else f"{self.kind} ({self.python})"

    def run(self, shape: Shape, tokens_path: str, warmup: int) -> None:
        """Trains once in a process of its own. Raises SystemExit where that fails."""
        command = [self.python, __file__, "--worker", self.kind, "--tokens-file", tokens_path]
        for field in dataclasses.fields(shape):
            command += [f"--{field.name.replace('_', '-')}", str(getattr(shape, field.name))]
        self.losses = []
        environment = os.environ | self.variables
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                self._take(json.loads(line), shape, warmup)
        if process.returncode or len(self.losses) != shape.steps:
            raise SystemExit(f"bench: {self.name} ended with exit code {process.returncode}")
        self._check_losses(shape)

    def _take(self, line: dict[str, Any], shape: Shape, warmup: int) -> None:
        if "loss" not in line:
            self.versions = line
            return
        self.losses.append(line["loss"])
        measured = len(self.losses) > warmup
        if measured:
            self.step_s.append(line["step_s"])
            self.cpu_s.append(line["cpu_s"])
        say(
            f"  {self.name}: step {len(self.losses)}/{shape.steps}, loss {line['loss']:.4f}, "
            f"{line['step_s']:.2f} s, {line['cpu_s']:.2f} CPU-s, "
            f"{shape.tokens_per_step / line['step_s']:.0f} tokens/s"
            + ("" if measured else " (warm-up, not counted)")
        )

    def _check_losses(self, shape: Shape) -> None:
        expected = math.log(shape.vocab)
        # A NaN compares as False.
        if not abs(self.losses[0] - expected) < FIRST_LOSS_TOLERANCE:
            raise SystemExit(
                f"bench: {self.name} began with loss {self.losses[0]:.4f}; an untrained model's "
                f"is near ln({shape.vocab}) = {expected:.4f}"
            )
        if not all(map(math.isfinite, self.losses)):
            raise SystemExit(f"bench: {self.name} reached a loss that is not finite")

    def summary(self, shape: Shape) -> dict[str, Any]:
        step_s = statistics.median(self.step_s)
        return {
            "name": self.name,
            "kind": self.kind,
            "variables": self.variables,
            "versions": self.versions,
            "tokens_per_s": round(shape.tokens_per_step / step_s, 1),
            "step_s": round(step_s, 6),
            "step_s_min": round(min(self.step_s), 6),
            "step_s_max": round(max(self.step_s), 6),
            "cpu_s_per_step": round(statistics.median(self.cpu_s), 6),
            "measured_steps": len(self.step_s),
            "losses": [round(loss, 4) for loss in self.losses],
        }


def write_tokens(path: str, shape: Shape) -> None:
    """Writes int32 tokens [steps, batch, sequence]: low ids often, high ones rarely, as in text."""
    draw = random.Random(0)
    count = shape.steps * shape.tokens_per_step
    tokens = array.array("i", (int(shape.vocab ** draw.random()) - 1 for _ in range(count)))
    if sys.byteorder == "big":
        tokens.byteswap()
    Path(path).write_bytes(tokens.tobytes())


def compare(contestants: list[Contestant], shape: Shape, rounds: int, warmup: int) -> None:
    """Runs every contestant once a round, in turns, and prints the line of JSON."""
    with tempfile.TemporaryDirectory(prefix="meshlm-bench-") as folder:
        tokens_path = os.path.join(folder, "tokens.bin")
        write_tokens(tokens_path, shape)
        for number in range(1, rounds + 1):
            for contestant in contestants:
                say(f"round {number}/{rounds}: {contestant.name}")
                contestant.run(shape, tokens_path, warmup)
    summaries = [contestant.summary(shape) for contestant in contestants]
    base = summaries[0]
    result = {
        "benchmark": "train",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "warmup_steps": warmup,
        "contestants": summaries,
        "ratios_to_torch": {
            s["name"]: round(base["step_s"] / s["step_s"], 3) for s in summaries[1:]
        },
        "cpu_ratios_to_torch": {
            s["name"]: round(base["cpu_s_per_step"] / s["cpu_s_per_step"], 3) for s in summaries[1:]
        },
    }
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    options = argparse.ArgumentParser(prog="bench/train.py", description=__doc__.splitlines()[0])
    default_torch = ROOT / ".venv-parity/bin/python"
    options.add_argument(
        "--torch-python",
        default=str(default_torch),
        help="interpreter with torch and transformers [.venv-parity/bin/python]",
    )
    options.add_argument(
        "--meshlm-python",
        action="append",
        help="interpreter with MeshLM; may be given several times "
        "[.venv/bin/python and .venv-parity/bin/python]",
    )
    options.add_argument(
        "--torch-huge-pages",
        action="store_true",
        help="give torch the huge pages too that `meshlm train` gives itself",
    )
    options.add_argument("--rounds", type=positive, default=3, help="turns of everyone [3]")
    options.add_argument("--warmup", type=int, default=2, help="first steps left out [2]")
    for name, default in (
        ("steps", 6),
        ("layers", 8),
        ("d-model", 512),
        ("heads", 8),
        ("rotary-dim", 32),
        ("vocab", 50_400),
        ("batch-size", 8),
        ("seq-len", 512),
    ):
        options.add_argument(f"--{name}", type=positive, default=default, help=f"[{default}]")
    # What the harness hands to its own processes.
    options.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options.add_argument("--tokens-file", help=argparse.SUPPRESS)
    return options


def main() -> None:
    options = parser()
    given = options.parse_args()
    shape = Shape(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Shape)})
    if given.worker:
        work(given.worker, shape, given.tokens_file)
        return
    if shape.d_model % shape.heads or shape.rotary_dim > shape.d_model // shape.heads:
        options.error("--heads must divide --d-model, with --rotary-dim no wider than a head")
    if not 0 <= given.warmup < shape.steps:
        options.error(f"--warmup {given.warmup} leaves no step of --steps {shape.steps} to measure")
    pythons = given.meshlm_python or [
        str(ROOT / folder / "bin/python") for folder in (".venv", ".venv-parity")
    ]
    for python in (given.torch_python, *pythons):
        if not os.access(python, os.X_OK):
            options.error(f"{python} is no interpreter: `make bench` prepares them")
    from meshlm.core.platform import huge_page_variables  # not where torch's worker runs

    # As `meshlm train` starts itself; torch's users start it as it is.
    variables = huge_page_variables()
    for_torch = variables if given.torch_huge_pages else {}
    contestants = [Contestant("torch", given.torch_python, for_torch)]
    contestants += [Contestant("meshlm", python, variables) for python in pythons]
    compare(contestants, shape, given.rounds, given.warmup)


if __name__ == "__main__":
    main()
