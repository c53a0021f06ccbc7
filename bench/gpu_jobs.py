"""What the processes of bench/gpu.py measure: one job a process, JSON in, a line of JSON out.

The jobs of MeshLM need its interpreter, those of torch one with torch and transformers. Nothing
here is imported before a job asks for it, so that each interpreter needs its own half alone.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from common import say, transformers_generate

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
# Of a device's memory what a step may need by the formula: the rest is the formula's error.
MEMORY_SHARE = 0.92
# A model that knows nothing yet is this close to ln(vocabulary), in nats, whatever its init.
FIRST_LOSS_TOLERANCE = 1.0

Json = dict[str, Any]


def token_batches(job: Json, batch_size: int) -> Iterator[Any]:
    """Yields int32 tokens [batch, sequence], a step each: low ids often, high ones rarely."""
    import numpy as np

    draw = np.random.default_rng(0)
    for _ in range(job["steps"]):
        shape = (batch_size, job["seq_len"])
        yield (job["model"]["vocab_size"] ** draw.random(shape)).astype(np.int32) - 1


def check_losses(losses: list[float], vocab_size: int) -> None:
    """Raises SystemExit where the losses are not those of a model that begins to learn."""
    expected = math.log(vocab_size)
    # A NaN compares as False.
    if not abs(losses[0] - expected) < FIRST_LOSS_TOLERANCE:
        raise SystemExit(f"the first loss is {losses[0]:.4f}; ln({vocab_size}) is {expected:.4f}")
    if not all(map(math.isfinite, losses)):
        raise SystemExit("a loss is not finite")


def first_that_fits(
    job: Json, run: Callable[[Json], Json], is_memory: Callable[[Exception], bool]
) -> Json:
    """Returns what the first candidate measured that had the memory for it, and all tried."""
    tried: list[Json] = []
    for candidate in job["candidates"]:
        try:
            found = run(candidate)
        except Exception as error:
            if not is_memory(error):
                raise
            say(f"    {candidate}: {str(error).splitlines()[0][:200]}")
            found = {"outcome": "out of memory"}
        tried.append({**candidate, **found})
        if found["outcome"] == "measured":
            return {**tried.pop(), "tried": tried}
        gc.collect()
    return {"outcome": "nothing fits", "tried": tried}


# MeshLM.


def device_meshlm(job: Json) -> Json:
    """What JAX computes on here, and the memory's speed as JAX's own programs reach it."""
    import jax

    from meshlm.core.platform import device_facts

    facts, stats = device_facts(), jax.devices()[0].memory_stats() or {}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": facts.platform,
        "kind": facts.kind,
        "count": facts.count,
        "memory_bytes": stats.get("bytes_limit", facts.memory_bytes or physical),
        "peak_flops_per_s": facts.peak_flops,
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
        **_measured_bandwidth(job["bandwidth_bytes"]),
    }


def _measured_bandwidth(size_bytes: int) -> Json:
    """Bytes a second of a sum (reads) and of an increment (reads and writes); the best of each."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(size_bytes // 2, jnp.bfloat16)
    programs = {
        "read_bytes_per_s": (jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)), 1),
        "copy_bytes_per_s": (jax.jit(lambda x: x + 1), 2),
    }
    found: Json = {}
    for name, (program, passes) in programs.items():
        program(x).block_until_ready()
        times_s = []
        for _ in range(10):
            began_s = time.perf_counter()
            program(x).block_until_ready()
            times_s.append(time.perf_counter() - began_s)
        found[name] = passes * size_bytes / min(times_s)
    return found


def parity_meshlm(job: Json) -> Json:
    """Logits, loss and gradients here against this machine's CPU in float32."""
    import dataclasses

    import jax

    from meshlm.model.compute import Compute
    from meshlm.model.families import model_from_record
    from meshlm.step import StepConfig

    model, optimizer = model_from_record(job["model"], "job"), _optimizer("adamw")
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    plain = StepConfig(model=model, optimizer=optimizer, compute=Compute(dtype="float32"))
    exact, half = (
        dataclasses.replace(plain, compute=_compute(model, job, device, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    wanted = _passes(cpu, plain, job, "highest")
    ways = {"float32": (exact, "highest"), "default": (exact, "default"), "bfloat16": (half, None)}
    return {
        name: {
            "attention": config.compute.attention,
            **_differences(_passes(device, config, job, precision), wanted),
        }
        for name, (config, precision) in ways.items()
    }


def _compute(
    model: Any, job: Json, device: Any, *, dtype: Any = "bfloat16", remat: Any = None
) -> Any:
    """How `meshlm train` computes this model on this device."""
    import dataclasses

    from meshlm.core.sharding import MeshConfig, make_mesh
    from meshlm.model.compute import choose_compute
    from meshlm.ops.fast_attention import choose_attention

    attention = choose_attention(
        make_mesh(devices=[device]),
        length=job["seq_len"],
        head_dim=model.head_dim,
        dtype=dtype,
        documents=False,
    )
    chosen = choose_compute(model, MeshConfig(), dtype=dtype, remat=remat)
    return dataclasses.replace(chosen, attention=attention)


def _passes(device: Any, config: Any, job: Json, precision: str | None) -> Json:
    """Returns logits, loss and gradients as numpy arrays, from the same weights everywhere."""
    import jax
    import numpy as np

    from meshlm.core.sharding import make_mesh, use_mesh
    from meshlm.core.tree import map_named, to_named
    from meshlm.model.params import weight_tree
    from meshlm.model.transformer import forward
    from meshlm.step import loss_and_grads

    draw = np.random.default_rng(0)

    def weight(_: str, of: Any) -> Any:
        # Every bias and norm away from its initial value, and attention that is not flat.
        return (of.fill + (of.std or 0.02) * draw.standard_normal(of.shape)).astype(np.float32)

    params = map_named(weight, weight_tree(config.model))
    tokens = next(token_batches(job, job["batch_size"]))
    with use_mesh(make_mesh(devices=[device])), jax.default_matmul_precision(precision):
        params, batch = jax.device_put((params, _step_batch(tokens)), device)
        logits = jax.jit(lambda p: forward(p, config.model, batch.tokens, config.compute))(params)
        loss, grads, _ = jax.jit(lambda p, b: loss_and_grads(p, b, config))(params, batch)
        named = {name: np.asarray(grad) for name, grad in to_named(grads).items()}
        return {"logits": np.asarray(logits), "loss": float(loss), "gradients": named}


def _step_batch(tokens: Any) -> Any:
    import numpy as np

    from meshlm.step import StepBatch

    # As with HF's labels, the last token of a row predicts nothing.
    loss_mask = np.ones(tokens.shape, np.float32)
    loss_mask[:, -1] = 0
    targets = np.roll(tokens, -1, axis=1)
    return StepBatch(tokens=tokens, targets=targets, loss_mask=loss_mask, segment_ids=None)


def _differences(found: Json, wanted: Json) -> Json:
    """Logits relative to the largest; each gradient's difference in L2, relative to its own."""
    import numpy as np

    norm = np.linalg.norm
    errors = {
        name: float(norm(found["gradients"][name] - grad) / norm(grad))
        for name, grad in wanted["gradients"].items()
    }
    worst = max(errors, key=lambda name: errors[name])
    logits = np.abs(found["logits"] - wanted["logits"]).max() / np.abs(wanted["logits"]).max()
    return {
        "logits": float(logits),
        "loss": abs(found["loss"] - wanted["loss"]) / wanted["loss"],
        "gradients": errors[worst],
        "worst_gradient": worst,
    }


def _optimizer(name: Any) -> Any:
    from meshlm.optim import OptimizerConfig

    return OptimizerConfig(
        name=name,
        learning_rate=LEARNING_RATE,
        end_learning_rate=LEARNING_RATE,
        warmup_steps=0,
        anneal_steps=0,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )


def train_meshlm(job: Json) -> Json:
    """MeshLM's own step, computed as `meshlm train` chooses to on this device."""
    import jax

    def is_memory(error: Exception) -> bool:
        return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)

    return first_that_fits(job, lambda candidate: _train_meshlm(job, candidate), is_memory)


def _train_meshlm(job: Json, candidate: Json) -> Json:
    import jax

    from meshlm.core.sharding import MeshConfig, make_mesh, use_mesh
    from meshlm.model.families import model_from_record
    from meshlm.planning.memory import estimate_memory
    from meshlm.planning.setup import Setup
    from meshlm.step import StepConfig, compile_train_step, init_state

    mesh, model = make_mesh(devices=jax.devices()[:1]), model_from_record(job["model"], "job")
    with use_mesh(mesh):
        compute = _compute(model, job, jax.devices()[0], remat=candidate["remat"])
        config = StepConfig(
            model=model, optimizer=_optimizer(candidate["optimizer"]), compute=compute
        )
        rows = candidate["batch_size"]
        setup = Setup(step=config, mesh=MeshConfig(), batch_size=rows, seq_len=job["seq_len"])
        estimated = estimate_memory(setup).total_bytes
        found = {"estimated_bytes": estimated, "attention": compute.attention}
        if estimated > MEMORY_SHARE * job["memory_bytes"]:
            return {**found, "outcome": "does not fit by the formula"}
        state, step = jax.jit(lambda: init_state(config, 0))(), compile_train_step(config)
        losses, step_s = [], []
        for tokens in token_batches(job, rows):
            batch = jax.device_put(_step_batch(tokens), jax.devices()[0])
            began_s = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            step_s.append(time.perf_counter() - began_s)
            losses.append(float(metrics.loss))
            say(f"    step {len(losses)}: loss {losses[-1]:.4f}, {step_s[-1]:.3f} s")
    check_losses(losses, model.vocab_size)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        **found,
        "outcome": "measured",
        "losses": losses,
        "step_s": step_s[job["warmup"] :],
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def decode_meshlm(job: Json) -> Json:
    """Times of `Generator.generate`, what `meshlm generate` calls, on random bfloat16 weights."""
    import jax

    from meshlm.core.sharding import make_mesh, use_mesh
    from meshlm.core.tree import cast_floating
    from meshlm.generation.config import SamplingConfig
    from meshlm.generation.decode import DecodeModel
    from meshlm.generation.generate import Generator
    from meshlm.model.compute import Compute
    from meshlm.model.families import model_from_record
    from meshlm.model.params import init_params

    model, mesh = model_from_record(job["model"], "job"), make_mesh(devices=jax.devices()[:1])
    with use_mesh(mesh):
        draw = jax.jit(lambda: cast_floating(init_params(model, jax.random.key(0)), "bfloat16"))
        params = draw()
    ready = DecodeModel.prepare(params, model, Compute(), allowed_vocab=model.vocab_size, mesh=mesh)
    del params
    generator = Generator(
        ready,
        end_ids=(),
        start_id=None,
        token_bytes=lambda token: b"",
        max_rows=max(job["batch_sizes"]),
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        sampling = SamplingConfig(max_tokens=new_tokens, temperature=0.0, ignore_end_of_text=True)
        return [samples[0].tokens for samples in generator.generate(prompts, sampling)]

    return _decode(job, generate)


def _decode(job: Json, generate: Callable[[list[list[int]], int], list[list[int]]]) -> Json:
    """Returns for each batch size the seconds to the first token, and of a step after it."""
    import numpy as np

    draw, found = np.random.default_rng(0), {}
    for rows in job["batch_sizes"]:
        prompts = draw.integers(0, job["model"]["vocab_size"], (rows, job["prompt_tokens"]))
        turns: list[tuple[float, float]] = []
        for turn in range(1 + job["turns"]):
            began_s = time.perf_counter()
            generate(prompts.tolist(), 1)
            first_s = time.perf_counter() - began_s
            tokens = generate(prompts.tolist(), job["new_tokens"])
            whole_s = time.perf_counter() - began_s - first_s
            assert all(len(row) == job["new_tokens"] for row in tokens), "too few tokens"
            if turn:
                step_s = max(whole_s - first_s, 1e-9) / (job["new_tokens"] - 1)
                turns.append((first_s, step_s))
        firsts, steps = zip(*turns, strict=True)
        found[str(rows)] = {"first_s": list(firsts), "step_s": list(steps)}
        say(f"    {rows} rows: {rows / statistics.median(steps):.1f} tokens/s")
    return {"batches": found}


# torch.


def device_torch(job: Json) -> Json:
    """What torch would compute on."""
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    return {
        "platform": "gpu" if gpu else "cpu",
        "kind": torch.cuda.get_device_name(0) if gpu else "cpu",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _torch_config(job: Json) -> Any:
    import transformers

    model = job["model"]
    return transformers.GPTJConfig(
        vocab_size=model["vocab_size"],
        n_positions=model["context_length"],
        n_embd=model["d_model"],
        n_layer=model["num_layers"],
        n_head=model["num_heads"],
        n_inner=model["d_ff"],
        rotary_dim=model["rotary_dim"],
        bos_token_id=0,
        eos_token_id=0,
    )


def train_torch(job: Json) -> Json:
    """transformers as its documentation trains: bf16 autocast, labels in, loss out."""
    import torch

    def is_memory(error: Exception) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def run(candidate: Json) -> Json:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return _train_torch(job, candidate)

    return first_that_fits(job, run, is_memory)


def _train_torch(job: Json, candidate: Json) -> Json:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.GPTJForCausalLM(_torch_config(job)).train()
    model.config.use_cache = False
    if candidate["remat"] != "none":
        model.gradient_checkpointing_enable()
    optimizer = _torch_optimizer(candidate["optimizer"], model)
    losses, step_s = [], []
    for batch in token_batches(job, candidate["batch_size"]):
        tokens = torch.from_numpy(batch).long().to(device)
        _synchronise(device)
        began_s = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronise(device)
        step_s.append(time.perf_counter() - began_s)
        losses.append(loss.item())
        say(f"    step {len(losses)}: loss {losses[-1]:.4f}, {step_s[-1]:.3f} s")
    check_losses(losses, job["model"]["vocab_size"])
    return {
        "outcome": "measured",
        "attention": model.config._attn_implementation,
        "losses": losses,
        "step_s": step_s[job["warmup"] :],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _torch_optimizer(name: str, model: Any) -> Any:
    import torch

    if name == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
    # One tensor after the other: all at once would need their updates all at once.
    return torch.optim.Adafactor(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=False
    )


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def decode_torch(job: Json) -> Json:
    """Times of transformers' `generate` on random bfloat16 weights."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.GPTJForCausalLM(_torch_config(job)).eval()

    return _decode(job, transformers_generate(model, device))


JOBS: dict[tuple[str, str], Callable[[Json], Json]] = {
    ("meshlm", "device"): device_meshlm,
    ("meshlm", "parity"): parity_meshlm,
    ("meshlm", "train"): train_meshlm,
    ("meshlm", "decode"): decode_meshlm,
    ("torch", "device"): device_torch,
    ("torch", "train"): train_torch,
    ("torch", "decode"): decode_torch,
}


def main(kind: str, what: str, text: str) -> None:
    print(json.dumps(JOBS[kind, what](json.loads(text))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
