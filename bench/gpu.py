"""MeshLM on a GPU: right numbers, training and decoding, beside transformers on torch.

One call on a machine with a GPU does it all, in this order:

    parity   logits, loss and gradients in float32 against this machine's CPU
    train    tokens a second and MFU of the presets, with the optimizer and the recomputation that
             fit the device's memory
    decode   tokens a second at several batch sizes, and the share of the memory's measured speed

Every measurement is a process of its own, so that all memory is free for it. MeshLM and torch take
turns (`--rounds`) at the same shapes; medians count. Progress goes to stderr, one line of JSON to
stdout, and on a GPU the same into bench/results/, anew after every part. Without a GPU, small
shapes run on the CPU: that shows that the script works, and nothing else.

    .venv/bin/python bench/gpu.py
    .venv/bin/python bench/gpu.py --parts train --presets gpt-j-6b --rounds 1

MFU is 6 P + 6 L T N H FLOPs a token (P: weights that multiply; L layers, T tokens in a sequence,
N H the heads' width; causal attention, no recomputation) times tokens a second, divided by the
data sheet's dense bfloat16 peak, for both sides alike. The share of bandwidth is the bytes that a
decoding step must read (weights in bfloat16, keys and values of the tokens so far), divided by
its time and by the measured speed of reading or copying, whichever is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import positive, say
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.flops import flops_per_token, matmul_params, mfu
from meshlm.model.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]
PARTS = ("parity", "train", "decode")
# In float32 with exact products, largest difference: of logits, of the loss, of a gradient.
PARITY_LIMITS = {"logits": 2e-5, "loss": 1e-5, "gradients": 1e-4}
# With operands rounded to 8 bits the same program differs by about this from float32.
HALF_LIMITS = {"logits": 5e-2, "loss": 1e-2, "gradients": 1e-1}
SMALL = gpt_j(
    num_layers=1,
    d_model=128,
    num_heads=4,
    head_dim=32,
    d_ff=512,
    vocab_size=512,
    context_length=128,
    rotary_dim=16,
)


def candidates(batch_sizes: tuple[int, ...]) -> list[Json]:
    """Returns ways to train, the one that is tried first first."""
    ways = [("none", rows) for rows in batch_sizes[:1]]
    ways += [("minimal", rows) for rows in batch_sizes[:2]]
    ways += [("full", rows) for rows in batch_sizes]
    return [
        {"optimizer": optimizer, "remat": remat, "batch_size": rows}
        for optimizer in ("adamw", "adafactor")
        for remat, rows in ways
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; `small` shapes are for machines without a GPU."""

    parts: list[str]
    presets: dict[str, ModelConfig]
    decode_preset: str
    decode_model: ModelConfig
    parity_models: dict[str, ModelConfig]
    seq_len: int
    train_batch_sizes: tuple[int, ...]
    decode_batch_sizes: list[int]
    prompt_tokens: int
    new_tokens: int
    steps: int
    warmup: int
    rounds: int
    bandwidth_bytes: int


def plan(given: argparse.Namespace, small: bool) -> Plan:
    """Returns what the command line asks for."""
    if small:
        return Plan(
            parts=given.parts,
            presets={"small": SMALL},
            decode_preset="small",
            decode_model=SMALL,
            parity_models={"small": SMALL},
            seq_len=32,
            train_batch_sizes=(2, 1),
            decode_batch_sizes=[1, 2],
            prompt_tokens=16,
            new_tokens=64,
            steps=3,
            warmup=1,
            rounds=given.rounds,
            bandwidth_bytes=1 << 26,
        )
    # GPT-J's heads, and those of the smaller presets.
    wide = dataclasses.replace(SMALL, d_model=512, num_heads=2, head_dim=256, rotary_dim=64)
    narrow = dataclasses.replace(wide, num_heads=4, head_dim=128)
    return Plan(
        parts=given.parts,
        presets={name: PRESETS[name] for name in given.presets},
        decode_preset=given.decode_preset,
        decode_model=PRESETS[given.decode_preset],
        parity_models={"head_dim 256": wide, "head_dim 128": narrow},
        seq_len=given.seq_len,
        train_batch_sizes=(8, 4, 2, 1),
        decode_batch_sizes=given.batch_sizes,
        prompt_tokens=128,
        new_tokens=128,
        steps=given.steps,
        warmup=given.warmup,
        rounds=given.rounds,
        bandwidth_bytes=1 << 30,
    )


class Side:
    """MeshLM or torch: an interpreter, and the jobs that it does."""

    def __init__(self, kind: str, python: str, variables: dict[str, str]) -> None:
        self.kind, self.python = kind, python
        self.environment = os.environ | variables

    def do(self, what: str, **job: Any) -> Json:
        """Returns what a job measured. Raises subprocess.CalledProcessError where it failed."""
        command = [self.python, str(ROOT / "bench/gpu_jobs.py"), self.kind, what, json.dumps(job)]
        ran = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(ran.stdout.splitlines()[-1])


class Bench:
    """The run: its sides, the device, and the result as far as it is."""

    def __init__(self, sides: list[Side], device: Json, result: Json, path: Path | None) -> None:
        self.sides, self.device, self.result, self.path = sides, device, result, path
        self.failures: list[str] = []

    def run(self, plan: Plan) -> None:
        """Does the parts in turn; each is written when it is done."""
        for part in plan.parts:
            say(part)
            self.result[part] = getattr(self, part)(plan)
            self.result["failures"] = self.failures
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self.result, indent=1) + "\n")

    def parity(self, plan: Plan) -> Json:
        """Returns the differences of each shape and precision."""
        found = {}
        for name, model in plan.parity_models.items():
            job = {"model": dataclasses.asdict(model), "batch_size": 2, "steps": 1}
            found[name] = self._do(self.sides[0], "parity", **job, seq_len=min(128, plan.seq_len))
            for precision, limits in (("float32", PARITY_LIMITS), ("bfloat16", HALF_LIMITS)):
                self._check(f"{name} {precision}", found[name].get(precision), limits)
        return found

    def _check(self, name: str, found: Json | None, limits: dict[str, float]) -> None:
        for what, limit in limits.items():
            # A NaN compares as False.
            if found is not None and not found[what] <= limit:
                self._fail(f"parity: {name}: {what} differ by {found[what]:.1e}, not {limit:.0e}")

    def train(self, plan: Plan) -> Json:
        """Returns for each preset and side what fitted, and its speed."""
        return {name: self._train(name, model, plan) for name, model in plan.presets.items()}

    def _train(self, name: str, model: ModelConfig, plan: Plan) -> Json:
        turns: dict[str, list[Json]] = {side.kind: [] for side in self.sides}
        for number in range(1, plan.rounds + 1):
            for side in self.sides:
                past = turns[side.kind]
                # What fitted in the first round.
                ways = [_way(past[0])] if past else self._ways(side, model, plan)
                say(f"  {name}, round {number}/{plan.rounds}: {side.kind}")
                found = self._do(
                    side,
                    "train",
                    model=dataclasses.asdict(model),
                    seq_len=plan.seq_len,
                    candidates=ways,
                    steps=plan.steps,
                    warmup=plan.warmup,
                    memory_bytes=self.device["memory_bytes"],
                )
                if found.get("outcome") == "measured":
                    past.append(found)
                elif number == 1:
                    self.result.setdefault("not_measured", {})[f"train {name} {side.kind}"] = found
        return {kind: self._speed(past, model, plan) for kind, past in turns.items() if past}

    def _ways(self, side: Side, model: ModelConfig, plan: Plan) -> list[Json]:
        """Returns the ways to train whose weights, gradients and moments alone do fit.

        torch computes a layer again, or does not: `minimal` is MeshLM's.
        """
        weights = matmul_params(model) + model.vocab_size * model.d_model
        state = {"adamw": 16 * weights, "adafactor": 8 * weights}
        return [
            way
            for way in candidates(plan.train_batch_sizes)
            if state[way["optimizer"]] < self.device["memory_bytes"]
            and (side.kind == "meshlm" or way["remat"] != "minimal")
        ]

    def _speed(self, turns: list[Json], model: ModelConfig, plan: Plan) -> Json:
        step_s = [s for turn in turns for s in turn["step_s"]]
        tokens_per_s = turns[0]["batch_size"] * plan.seq_len / statistics.median(step_s)
        used = mfu(
            tokens_per_s, flops_per_token(model, plan.seq_len), self.device["peak_flops_per_s"]
        )
        return {
            **_way(turns[0]),
            **{key: turns[0].get(key) for key in ("attention", "estimated_bytes", "tried")},
            "peak_bytes": max((turn["peak_bytes"] or 0 for turn in turns), default=0) or None,
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": None if used is None else round(used, 4),
            "step_s": round(statistics.median(step_s), 6),
            "step_s_min": round(min(step_s), 6),
            "step_s_max": round(max(step_s), 6),
            "measured_steps": len(step_s),
            "losses": [round(loss, 4) for loss in turns[-1]["losses"]],
        }

    def decode(self, plan: Plan) -> Json:
        """Returns for each side and batch size the speed and its share of the bandwidth."""
        turns: dict[str, list[Json]] = {side.kind: [] for side in self.sides}
        for number in range(1, plan.rounds + 1):
            for side in self.sides:
                say(f"  {plan.decode_preset}, round {number}/{plan.rounds}: {side.kind}")
                found = self._do(
                    side,
                    "decode",
                    model=dataclasses.asdict(plan.decode_model),
                    batch_sizes=plan.decode_batch_sizes,
                    prompt_tokens=plan.prompt_tokens,
                    new_tokens=plan.new_tokens,
                    turns=2,
                )
                if "batches" in found:
                    turns[side.kind].append(found["batches"])
        return {
            "preset": plan.decode_preset,
            **{kind: self._decoded(past, plan) for kind, past in turns.items() if past},
        }

    def _decoded(self, turns: list[Json], plan: Plan) -> Json:
        bandwidth = max(self.device["read_bytes_per_s"], self.device["copy_bytes_per_s"])
        found = {}
        for rows in plan.decode_batch_sizes:
            step_s = [s for turn in turns for s in turn[str(rows)]["step_s"]]
            median_s = statistics.median(step_s)
            read = bytes_per_step(plan, rows)
            found[str(rows)] = {
                "tokens_per_s": round(rows / median_s, 2),
                "step_s": round(median_s, 6),
                "step_s_min": round(min(step_s), 6),
                "step_s_max": round(max(step_s), 6),
                "first_s": round(
                    statistics.median(s for turn in turns for s in turn[str(rows)]["first_s"]), 6
                ),
                "bytes_per_step": read,
                "bandwidth_share": round(read / median_s / bandwidth, 4),
            }
        return found

    def _do(self, side: Side, what: str, **job: Any) -> Json:
        try:
            return side.do(what, **job)
        except subprocess.CalledProcessError as error:
            self._fail(f"{what}: {side.kind} ended with exit code {error.returncode}")
            return {"outcome": f"exit code {error.returncode}"}

    def _fail(self, text: str) -> None:
        say(f"FAILED: {text}")
        self.failures.append(text)


def _way(found: Json) -> Json:
    return {key: found[key] for key in ("optimizer", "remat", "batch_size")}


def bytes_per_step(plan: Plan, rows: int) -> int:
    """Returns the bytes that a decoding step must read: weights once, each row's keys and values.

    A row has, on average over the steps, its prompt and half of the new tokens behind it.
    """
    model = plan.decode_model
    token = 2 * 2 * model.num_layers * model.num_heads * model.head_dim
    behind = plan.prompt_tokens + plan.new_tokens / 2
    return round(2 * matmul_params(model) + rows * behind * token)


def find_torch(given: str | None) -> str | None:
    """Returns the interpreter with torch and transformers: the given one, or one that is here."""
    look = "from importlib.util import find_spec as f; exit(not (f('torch') and f('transformers')))"
    if given is not None:
        return given
    for python in (sys.executable, str(ROOT / ".venv-parity/bin/python")):
        if os.access(python, os.X_OK) and subprocess.run([python, "-c", look]).returncode == 0:
            return python
    return None


def gpu_driver() -> str | None:
    """Returns the GPU's name, driver and power limit, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.splitlines()[0].strip() if ran.stdout.strip() else None


def torch_side(python: str | None, device: Json, result: Json) -> list[Side]:
    """Returns torch's side where it computes on the same kind of device; else says why not."""
    why = "no interpreter with torch and transformers: give --torch-python"
    if python is not None:
        side = Side("torch", python, {"TOKENIZERS_PARALLELISM": "false"})
        found = side.do("device")
        if found["platform"] == device["platform"]:
            result["torch"] = found
            return [side]
        why = f"torch {found['versions']['torch']} of {python} has no GPU here"
    say(f"without torch: {why}")
    result["torch"] = {"left_out": why}
    return []


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    options = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__.splitlines()[0])
    options.add_argument("--small", action="store_true", help="small shapes, on a GPU too")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[all]")
    options.add_argument(
        "--presets",
        nargs="+",
        choices=PRESETS,
        default=["1.3b", "2.7b", "gpt-j-6b"],
        help="to train [1.3b 2.7b gpt-j-6b]",
    )
    options.add_argument("--decode-preset", choices=PRESETS, default="gpt-j-6b", help="[gpt-j-6b]")
    options.add_argument(
        "--batch-sizes", nargs="+", type=positive, default=[1, 8, 64], help="to decode [1 8 64]"
    )
    options.add_argument("--seq-len", type=positive, default=2048, help="to train [2048]")
    options.add_argument("--steps", type=positive, default=8, help="of one turn [8]")
    options.add_argument("--warmup", type=int, default=3, help="first steps left out [3]")
    options.add_argument("--rounds", type=positive, default=3, help="turns of each side [3]")
    options.add_argument("--torch-python", help="interpreter with torch and transformers [found]")
    options.add_argument("--alone", action="store_true", help="leave torch out")
    options.add_argument(
        "--output", type=Path, help="file for the JSON [bench/results/ on a GPU, else none]"
    )
    return options


def main() -> None:
    options = parser()
    given = options.parse_args()
    if not 0 <= given.warmup < given.steps:
        options.error(f"--warmup {given.warmup} leaves no step of --steps {given.steps} to measure")
    if given.torch_python is not None and not os.access(given.torch_python, os.X_OK):
        options.error(f"--torch-python {given.torch_python} is no interpreter")
    for name in given.presets:
        if given.seq_len > PRESETS[name].context_length:
            options.error(f"--seq-len {given.seq_len} is longer than the context of {name}")
    with tempfile.TemporaryDirectory(prefix="meshlm-bench-") as folder:
        # A later turn need not compile again.
        variables = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        }
        own = Side("meshlm", sys.executable, variables)
        device = own.do("device", bandwidth_bytes=plan(given, True).bandwidth_bytes)
        small = given.small or device["platform"] != "gpu"
        if not small:
            device = own.do("device", bandwidth_bytes=plan(given, False).bandwidth_bytes)
        else:
            say(f"small shapes, on {device['kind']}: nothing here is a measurement of a GPU")
        now = datetime.datetime.now(datetime.UTC)
        result: Json = {
            "benchmark": "gpu",
            "date": now.isoformat(timespec="seconds"),
            "device": device,
            "driver": gpu_driver(),
            "small": small,
        }
        path = given.output
        if path is None and not small:
            kind = re.sub(r"\W+", "-", device["kind"]).strip("-").lower()
            path = ROOT / f"bench/results/gpu-{now:%Y-%m-%d}-{kind}.json"
        sides = [own]
        if not given.alone:
            sides += torch_side(find_torch(given.torch_python), device, result)
        bench = Bench(sides, device, result, path)
        wanted = plan(given, small)
        result["settings"] = {
            "seq_len": wanted.seq_len,
            "prompt_tokens": wanted.prompt_tokens,
            "new_tokens": wanted.new_tokens,
            "rounds": wanted.rounds,
            "steps": wanted.steps,
            "warmup": wanted.warmup,
        }
        bench.run(wanted)
    print(json.dumps(result))
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
