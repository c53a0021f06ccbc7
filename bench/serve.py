"""Speed of reading prompts and of decoding on this machine's CPU, MeshLM beside others.

One random GPT-J, written once in Hugging Face's layout, is loaded by everyone: by MeshLM in
float32, bfloat16 and int8, by transformers on torch in bfloat16, by CTranslate2 in int8. Each
contestant is a process in its own interpreter, with the same number of threads. They take turns at
the same prompts, a greedy continuation each time, because other work on the machine changes from
minute to minute. Prefill is the time to the first token; decoding is what the further ones take.
Progress goes to stderr, one line of JSON with the medians and the ratios to stdout.

    .venv/bin/python bench/serve.py --rounds 5
    .venv/bin/python bench/serve.py --small --rounds 2
    .venv/bin/python bench/serve.py --perplexity runs/demo
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Generate, cpu_model, positive, say, transformers_generate

ROOT = Path(__file__).resolve().parent.parent
# Of the 8 rows' first tokens those that must be the same as the first contestant's: rounding moves
# a few, another model or another prompt would leave none.
SAME_FIRST_TOKENS = 0.5
# Held-out tokens that `--perplexity` scores.
PERPLEXITY_TOKENS = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is decoded. The names are those of the command line."""

    layers: int
    d_model: int
    heads: int
    rotary_dim: int
    vocab: int
    prompt_tokens: int
    new_tokens: int
    threads: int

    def prompts(self, batch_size: int) -> list[list[int]]:
        """Returns the prompts: random ids, different in each row."""
        draw = random.Random(0)
        rows = [
            [draw.randrange(self.vocab) for _ in range(self.prompt_tokens)]
            for _ in range(max(8, batch_size))
        ]
        return rows[:batch_size]


def write_model(shape: Shape, folder: Path) -> None:
    """Writes the random model as transformers has it, in bfloat16, and for CTranslate2 in int8."""
    import ctranslate2
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=shape.vocab,
        n_positions=max(256, shape.prompt_tokens + shape.new_tokens),
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        rotary_dim=shape.rotary_dim,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPTJForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "hf")
    convert = ctranslate2.converters.TransformersConverter(str(folder / "hf"))
    convert.load_tokenizer = lambda *_: _NumberedTokens(shape.vocab)  # type: ignore[method-assign]
    convert.convert(str(folder / "ctranslate2"), quantization="int8")


class _NumberedTokens:
    """A tokenizer for the converter, which wants one: the token of id 7 is `t7`."""

    unk_token = bos_token = eos_token = "t0"

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(self._size)}


def open_torch(shape: Shape, folder: Path, dtype: str) -> tuple[dict[str, str], Generate]:
    """transformers as its documentation generates."""
    import torch
    import transformers

    torch.set_num_threads(shape.threads)
    model = transformers.GPTJForCausalLM.from_pretrained(
        folder / "hf", dtype=getattr(torch, dtype)
    ).eval()

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }, transformers_generate(model)


def open_ctranslate2(shape: Shape, folder: Path, dtype: str) -> tuple[dict[str, str], Generate]:
    """CTranslate2's own generator, greedy."""
    import ctranslate2

    model = ctranslate2.Generator(
        str(folder / "ctranslate2"),
        device="cpu",
        compute_type=dtype,
        inter_threads=1,
        intra_threads=shape.threads,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        results = model.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            min_length=new_tokens,
            max_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return {"ctranslate2": ctranslate2.__version__}, generate


def open_meshlm(shape: Shape, folder: Path, dtype: str) -> tuple[dict[str, str], Generate]:
    """`Model.generate`, as anyone calls it."""
    import jax

    import meshlm

    if dtype == "int8":
        model = meshlm.load(folder / "hf", quantize="int8")
    else:
        model = meshlm.load(folder / "hf", dtype=dtype)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        samples = model.generate(
            prompts, max_tokens=new_tokens, temperature=0.0, ignore_end_of_text=True
        )
        return [sample.tokens for sample in samples]

    return {"jax": jax.__version__}, generate


Open = Callable[[Shape, Path, str], "tuple[dict[str, str], Generate]"]
OPEN: dict[str, Open] = {
    "torch": open_torch,
    "ctranslate2": open_ctranslate2,
    "meshlm": open_meshlm,
}


def work(kind: str, dtype: str, shape: Shape, folder: Path) -> None:
    """Loads, says so, and then generates once for each batch size that comes on stdin."""
    versions, generate = OPEN[kind](shape, folder, dtype)
    print(json.dumps({"python": platform.python_version(), **versions}), flush=True)
    for line in sys.stdin:
        prompts = shape.prompts(int(line))
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        first = generate(prompts, 1)
        first_s = time.perf_counter() - start_s
        whole = generate(prompts, shape.new_tokens)
        whole_s = time.perf_counter() - start_s - first_s
        assert all(len(row) == shape.new_tokens for row in whole), "too few tokens"
        turn = {
            "first_s": first_s,
            "whole_s": whole_s,
            "cpu_s": time.process_time() - start_cpu_s,
            "first_tokens": [row[0] for row in first],
        }
        print(json.dumps(turn), flush=True)


# The harness.


class Contestant:
    """A process that generates when it is asked to, and what it measured."""

    def __init__(self, kind: str, dtype: str, python: str) -> None:
        self.kind, self.dtype, self.python = kind, dtype, python
        self.turns: dict[int, list[dict[str, Any]]] = {}
        self.versions: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        library = {"meshlm": "jax"}.get(self.kind, self.kind)
        version = f" {self.versions[library]}" if library in self.versions else ""
        return f"{self.kind} {self.dtype} ({library}{version})"

    def start(self, shape: Shape, folder: Path) -> None:
        """Starts the process and waits until it has loaded the model."""
        command = [self.python, __file__, "--worker", self.kind, self.dtype, str(folder)]
        command += shape_arguments(shape)
        threads = str(shape.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._read()
        say(f"{self.name}: loaded")

    def generate(self, batch_size: int, shape: Shape, measured: bool) -> None:
        """Lets it have one turn."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{batch_size}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        turn = self._read()
        if measured:
            self.turns.setdefault(batch_size, []).append(turn)
        say(
            f"  {self.name}: {batch_size} rows, first token after {turn['first_s']:.2f} s, "
            f"decoding {decode_speed(turn, batch_size, shape):.1f} tokens/s"
            + ("" if measured else " (warm-up, not counted)")
        )

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        assert self._process is not None
        raise SystemExit(f"bench: {self.name} ended with exit code {self._process.wait()}")

    def summary(self, shape: Shape) -> dict[str, Any]:
        batches = {}
        for batch_size, turns in self.turns.items():
            speeds = [decode_speed(turn, batch_size, shape) for turn in turns]
            first_s = statistics.median(turn["first_s"] for turn in turns)
            batches[str(batch_size)] = {
                "prefill_s": round(first_s, 4),
                "prefill_tokens_per_s": round(batch_size * shape.prompt_tokens / first_s, 1),
                "decode_tokens_per_s": round(statistics.median(speeds), 2),
                "decode_tokens_per_s_min": round(min(speeds), 2),
                "decode_tokens_per_s_max": round(max(speeds), 2),
                "cpu_s": round(statistics.median(turn["cpu_s"] for turn in turns), 3),
                "turns": len(turns),
                "first_tokens": turns[-1]["first_tokens"],
            }
        return {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "versions": self.versions,
            "batches": batches,
        }


def decode_speed(turn: dict[str, Any], batch_size: int, shape: Shape) -> float:
    """Returns tokens per second of all rows together, after the first token."""
    return batch_size * (shape.new_tokens - 1) / max(turn["whole_s"] - turn["first_s"], 1e-9)


def check_first_tokens(summaries: list[dict[str, Any]]) -> None:
    """Raises SystemExit where a contestant's first tokens are not of the same model."""
    wanted, *others = (list(s["batches"].values())[-1]["first_tokens"] for s in summaries)
    for summary, found in zip(summaries[1:], others, strict=True):
        same = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
        if same < SAME_FIRST_TOKENS:
            raise SystemExit(
                f"bench: {summary['name']} gives other first tokens than {summaries[0]['name']}: "
                f"{found} and {wanted}"
            )


def ratios(summaries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns each MeshLM's speed over each peer's, and its speed at many rows over one row."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for own in (s for s in summaries if s["kind"] == "meshlm"):
        row: dict[str, dict[str, float]] = {}
        for peer in (s for s in summaries if s["kind"] != "meshlm"):
            for what in ("prefill", "decode"):
                key = f"{what}_tokens_per_s"
                row[f"{what} to {peer['name']}"] = {
                    size: round(own["batches"][size][key] / peer["batches"][size][key], 3)
                    for size in own["batches"]
                }
        speeds = {size: b["decode_tokens_per_s"] for size, b in own["batches"].items()}
        one = next(iter(speeds.values()))
        row["decode to the fewest rows"] = {size: round(s / one, 3) for size, s in speeds.items()}
        found[own["name"]] = row
    return found


def compare(
    contestants: list[Contestant], shape: Shape, batch_sizes: list[int], rounds: int, python: str
) -> None:
    """Lets everyone take turns, and prints the line of JSON."""
    with tempfile.TemporaryDirectory(prefix="meshlm-bench-") as name:
        folder = Path(name)
        made = subprocess.run(
            [python, __file__, "--worker", "write", "", name, *shape_arguments(shape)],
            stdout=sys.stderr,
        )
        if made.returncode:
            raise SystemExit(f"bench: writing the model ended with exit code {made.returncode}")
        try:
            for contestant in contestants:
                contestant.start(shape, folder)
            for number in range(rounds + 1):
                say(f"round {number}/{rounds}" if number else "warm-up")
                for batch_size in batch_sizes:
                    for contestant in contestants:
                        contestant.generate(batch_size, shape, measured=number > 0)
        finally:
            for contestant in contestants:
                contestant.stop()
    summaries = [contestant.summary(shape) for contestant in contestants]
    check_first_tokens(summaries)
    result = {
        "benchmark": "serve",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "contestants": summaries,
        "ratios": ratios(summaries),
    }
    print(json.dumps(result))


def measure_perplexity(run: Path) -> None:
    """Prints the perplexity of a run's held-out text in its own type and in int8, as JSON."""
    import meshlm
    from meshlm.core.tree import count_bytes

    own = meshlm.load(run)
    windows = held_out(run, own.config.context_length)
    result: dict[str, Any] = {"benchmark": "perplexity", "run": str(run)}
    for name, model in ((own.compute.dtype, own), ("int8", meshlm.load(run, quantize="int8"))):
        scores = model.score(windows)
        # The first token of a window has nothing before it.
        log_probs = [p for score in scores for p in score.logprobs[1:]]
        result[name] = {
            "perplexity": round(math.exp(-math.fsum(log_probs) / len(log_probs)), 5),
            "tokens": len(log_probs),
            "weight_bytes": count_bytes(model.params),
        }
    cost = result["int8"]["perplexity"] / result[own.compute.dtype]["perplexity"]
    print(json.dumps(result | {"int8_over_own": round(cost, 6)}))


def held_out(run: Path, context_length: int) -> list[list[int]]:
    """Returns windows of the run's held-out tokens, spread evenly over its stores."""
    from meshlm.data.loader import eval_batches
    from meshlm.data.store import TokenStore
    from meshlm.training.run_folder import read_config

    record = read_config(run)
    if record is None:
        raise SystemExit(f"bench: {run} is no run: give a folder that `meshlm train` made")
    windows = []
    for data in record.data:
        for part in eval_batches(
            TokenStore.open(data.path),
            "val",
            seq_len=context_length - 1,
            batch_size=1,
            max_tokens=max(1, int(PERPLEXITY_TOKENS * data.weight)),
        ):
            windows.append(part.batch.tokens[0][part.batch.loss_mask[0] > 0].tolist())
    if not windows:
        raise SystemExit(f"bench: the stores of {run} have no held-out text")
    return windows


def shape_arguments(shape: Shape) -> list[str]:
    """Returns the options that make this shape."""
    words = []
    for field in dataclasses.fields(shape):
        words += [f"--{field.name.replace('_', '-')}", str(getattr(shape, field.name))]
    return words


# name, the shape that results are stated for, and one for any machine and for tests
SIZES = (
    ("layers", 24, 2),
    ("d-model", 1024, 64),
    ("heads", 16, 4),
    ("rotary-dim", 32, 8),
    ("vocab", 50_400, 512),
    ("prompt-tokens", 128, 16),
    ("new-tokens", 64, 64),
)
CONTESTANTS = (
    ("torch", "bfloat16"),
    ("ctranslate2", "int8"),
    ("meshlm", "float32"),
    ("meshlm", "bfloat16"),
    ("meshlm", "int8"),
)


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    options = argparse.ArgumentParser(prog="bench/serve.py", description=__doc__.splitlines()[0])
    options.add_argument(
        "--peer-python",
        default=str(ROOT / ".venv-parity/bin/python"),
        help="interpreter with torch, transformers and ctranslate2 [.venv-parity/bin/python]",
    )
    options.add_argument(
        "--meshlm-python",
        action="append",
        help="interpreter with MeshLM; may be given several times [.venv/bin/python]",
    )
    options.add_argument("--rounds", type=positive, default=5, help="turns of everyone [5]")
    options.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 8], help="rows at once [1 8]"
    )
    options.add_argument(
        "--only", nargs="+", metavar="NAME:TYPE", help="some of the contestants: meshlm:int8 ..."
    )
    options.add_argument("--small", action="store_true", help="a tiny model: does it all run?")
    options.add_argument(
        "--perplexity", type=Path, metavar="RUN", help="int8's cost on a run's held-out text"
    )
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--threads", type=positive, default=cores, help=f"of each [{cores}]")
    for name, default, small in SIZES:
        options.add_argument(f"--{name}", type=positive, help=f"[{default}; --small {small}]")
    # What the harness hands to its own processes.
    options.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return options


def main() -> None:
    options = parser()
    given = options.parse_args()
    if given.perplexity:
        measure_perplexity(given.perplexity)
        return
    sizes = {
        name.replace("-", "_"): getattr(given, name.replace("-", "_"))
        or (small if given.small else default)
        for name, default, small in SIZES
    }
    shape = Shape(threads=given.threads, **sizes)
    if given.worker:
        kind, dtype, folder = given.worker
        if kind == "write":
            write_model(shape, Path(folder))
        else:
            work(kind, dtype, shape, Path(folder))
        return
    if shape.d_model % shape.heads or shape.rotary_dim > shape.d_model // shape.heads:
        options.error("--heads must divide --d-model, with --rotary-dim no wider than a head")
    if shape.new_tokens < 2:
        options.error("--new-tokens 1 leaves nothing to decode after the first token")
    names = given.only or [":".join(pair) for pair in CONTESTANTS]
    unknown = [name for name in names if tuple(name.split(":")) not in CONTESTANTS]
    if unknown:
        known = ", ".join(":".join(pair) for pair in CONTESTANTS)
        options.error(f"--only {unknown[0]}: choose of {known}")
    pythons = given.meshlm_python or [str(ROOT / ".venv/bin/python")]
    for python in (given.peer_python, *pythons):
        if not os.access(python, os.X_OK):
            options.error(f"{python} is no interpreter: `make bench` prepares them")
    contestants = [
        Contestant(kind, dtype, python)
        for kind, dtype in (name.split(":") for name in names)
        for python in (pythons if kind == "meshlm" else [given.peer_python])
    ]
    batch_sizes = sorted(set(given.batch_sizes))
    compare(contestants, shape, batch_sizes, given.rounds, given.peer_python)


if __name__ == "__main__":
    main()
