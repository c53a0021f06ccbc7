"""The original's step that pods are compared by: its recorded run, our numbers, its sums."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm.core.sharding import use_mesh
from meshlm.model.families import gpt_j, with_embedding_bias
from meshlm.model.params import Params
from meshlm.optim import OptimizerConfig
from meshlm.step import StepBatch, StepConfig, loss_and_grads
from tiny import DIVISIBLE, F32, OPTIMIZER, draw_params, mesh_of, relative_l2

ROOT = Path(__file__).resolve().parents[2]
RECORDING = ROOT / "tests" / "fixtures" / "mtj" / "dev_train_s2"


@functools.cache
def original() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "original_pod", ROOT / "bench" / "original_pod.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["original_pod"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


# The recorded run of the original's own code: two copies of two shards, two parts a step.


def read_state(step: int, like: Any) -> Any:
    """The recorded state, by the order of its unnamed leaves alone."""
    shards = []
    for shard in range(2):
        leaves: list[np.ndarray] = []
        for number in range(16):
            with np.load(RECORDING / "full" / f"step_{step}" / f"shard_{shard}/{number}.npz") as f:
                leaves += [f[f"arr_{i}"] for i in range(len(f.files))]
        shards.append(leaves)
    assert {x.dtype for x in shards[0]} <= {np.dtype("float32"), np.dtype("int32")}
    stacked = [np.stack(pair) for pair in zip(*shards, strict=True)]
    assert [x.shape for x in stacked] == [x.shape for x in jax.tree.leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), stacked)


def recorded_config(dtype: str) -> Any:
    config = json.loads((RECORDING / "config.json").read_text())
    d_model, heads = config["d_model"], config["n_heads"]
    model = gpt_j(
        num_layers=config["layers"],
        d_model=d_model,
        num_heads=heads,
        head_dim=d_model // heads,
        d_ff=4 * d_model,
        vocab_size=config["n_vocab"],
        context_length=config["seq"],
        rotary_dim=config["pe_rotary_dims"],
    )
    optimizer = OptimizerConfig(
        learning_rate=config["lr"],
        end_learning_rate=config["end_lr"],
        warmup_steps=config["warmup_steps"],
        anneal_steps=config["anneal_steps"],
        weight_decay=config["weight_decay"],
    )
    return original().OriginalStep(model=model, optimizer=optimizer, dtype=dtype)


def replay(dtype: str, kind: str, steps: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Deviations of loss and norm from the recording, and the state after the steps."""
    module, mesh = original(), mesh_of(1, 2, 2)
    config = recorded_config(dtype)
    with np.load(RECORDING / "golden.npz") as file:
        golden = dict(file)
    with use_mesh(mesh):
        like = module.abstract_state(config, mesh)
        state = jax.tree.map(
            lambda x, at: jax.device_put(x.astype(at.dtype), at.sharding), read_state(0, like), like
        )
        step, rows = module.compile_step(config), module.batch_sharding(mesh)
        found = []
        for tokens_RAT in golden["train_tokens"][:steps].astype(np.int32):
            batch = jax.device_put((tokens_RAT[..., :-1], tokens_RAT[..., 1:]), rows)
            state, losses_RA, norm = step(state, *batch)
            # It was recorded before the division by the number of parts.
            found.append((np.mean(losses_RA), 2 * float(norm)))
    losses, norms = np.array(found, np.float64).T
    return (
        np.abs(losses / golden[f"train_loss_{kind}"][:steps] - 1),
        np.abs(norms / golden[f"grad_norm_{kind}"][:steps] - 1),
        state,
    )


def test_it_trains_as_the_original_did_without_rounding():
    losses, norms, _ = replay("float32", "f32", 20)
    assert losses.max() < 1e-6
    assert norms.max() < 5e-6


def test_it_trains_as_the_original_did():
    """The gradients rounded and added up in bfloat16: their norm is that of the recording."""
    losses, norms, state = replay("bfloat16", "mtj", 10)
    assert losses[0] < 1e-6
    assert losses.max() < 5e-4
    assert norms.max() <= 2**-7
    wanted = read_state(10, state)
    for name, tolerance in (("params", 2e-3), ("opt_state", 5e-2)):
        errors = jax.tree.leaves(jax.tree.map(relative_l2, state[name], wanted[name]))
        assert max(errors) < tolerance


# The same weights and tokens by MeshLM's own step.

MODEL = with_embedding_bias(dataclasses.replace(DIVISIBLE, num_layers=2))
PARTS, LENGTH = 2, 12


def split(params: Params, shards: int, share: float, norms: float) -> Any:
    """MeshLM's arrays as the original's shards of them.

    Args:
        share: the part of a bias that is summed over shards that each of them has.
        norms: what the shards after the first one have in place of scales and offsets.
    """

    def rows(x: Any, out: int) -> np.ndarray:
        return np.asarray(x).reshape(shards, out // shards, -1).swapaxes(1, 2)

    def columns(x: Any) -> np.ndarray:
        flat = np.asarray(x).reshape(len(x), shards, -1)
        return flat.transpose(1, 2, 0)

    def shared(x: Any) -> np.ndarray:
        return np.stack([np.asarray(x) * share] * shards)

    def first(x: Any) -> np.ndarray:
        return np.stack([np.asarray(x), *[np.full(x.shape, norms, x.dtype)] * (shards - 1)])

    def parts(x: Any) -> np.ndarray:
        return np.asarray(x).reshape(shards, -1)

    heads = MODEL.num_heads * MODEL.head_dim
    tree: dict[str, Any] = {
        "embedding": {
            "w": np.asarray(params.embedding.tokens).reshape(shards, -1, MODEL.d_model),
            "b": shared(params.embedding.bias),
        },
        "projection": {
            "linear": {
                "w": rows(params.head.weight, MODEL.vocab_size),
                "b": parts(params.head.bias),
            },
            "norm": {
                "scale": first(params.final_norm.scale),
                "offset": first(params.final_norm.offset),
            },
        },
    }
    for i in range(MODEL.num_layers):
        block = jax.tree.map(lambda x, i=i: x[i], params.blocks)
        norm, up, down = block.attention_norm, block.feed_forward.up, block.feed_forward.down
        tree[f"layer_{i}"] = {
            "linear": {"w": rows(block.attention.query.weight, heads)},
            "linear_1": {"w": rows(block.attention.value.weight, heads)},
            "linear_2": {"w": rows(block.attention.key.weight, heads)},
            "linear_3": {"w": columns(block.attention.out.weight)},
            "linear_4": {"w": rows(up.weight, MODEL.d_ff), "b": parts(up.bias)},
            "linear_5": {"w": columns(down.weight), "b": shared(down.bias)},
            "norm": {"scale": first(norm.scale), "offset": first(norm.offset)},
        }
    return tree


@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [((1, 1, 8), "float32", 1e-5), ((1, 2, 4), "bfloat16", 1e-2)],
    ids=str,
)
def test_its_loss_and_gradients_are_ours(sizes, dtype, tolerance):
    module, mesh = original(), mesh_of(*sizes)
    copies, shards = sizes[1], sizes[2]
    params = draw_params(MODEL)
    drawn = np.random.default_rng(1).integers(0, MODEL.vocab_size, (copies, PARTS, LENGTH + 1))
    tokens_RAT, targets_RAT = drawn[..., :-1].astype(np.int32), drawn[..., 1:].astype(np.int32)
    config = module.OriginalStep(model=MODEL, optimizer=OPTIMIZER, dtype=dtype)

    def on_device(params, tokens_RAT, targets_RAT):
        params = jax.tree.map(lambda x: x[0], params)
        losses, grads = module.summed_grads(params, tokens_RAT[0], targets_RAT[0], config)
        return losses[None], jax.tree.map(lambda x: x[None], grads)

    with use_mesh(mesh):
        like = module.abstract_state(config, mesh)["params"]
        theirs = split(params, shards, 1 / shards, 7.0)
        theirs = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), theirs, like)
        rows = module.batch_sharding(mesh)
        specs = [at.spec for at in (jax.tree.leaves(like)[0].sharding, rows)]
        compute = jax.shard_map(
            on_device, in_specs=(specs[0], specs[1], specs[1]), out_specs=(specs[1], specs[0]),
            check_vma=False,
        )  # fmt: skip
        batch = jax.device_put((tokens_RAT, targets_RAT), rows)
        losses_RA, grads = jax.jit(compute)(theirs, *batch)

    own = StepConfig(
        model=MODEL, optimizer=OPTIMIZER, compute=F32, z_loss=module.Z_LOSS, weight_dtype=dtype
    )
    flat = tokens_RAT.reshape(-1, LENGTH)
    batch = StepBatch(
        tokens=jnp.asarray(flat),
        targets=jnp.asarray(targets_RAT.reshape(-1, LENGTH)),
        loss_mask=jnp.ones(flat.shape),
        segment_ids=None,
    )
    loss, wanted, _ = jax.jit(lambda p, b: loss_and_grads(p, b, own))(params, batch)
    assert np.mean(losses_RA) == pytest.approx(float(loss), rel=1e-6)
    wanted = split(wanted, shards, 1.0, 0.0)
    found = jax.tree.map(lambda x: np.asarray(x, np.float32) / PARTS, grads)
    errors = jax.tree.map(relative_l2, found, wanted)
    assert max(jax.tree.leaves(errors)) < tolerance, errors


def test_a_layer_has_three_sums_of_activations():
    """One forward, one backward, and the forward one again; embedding and head have one each."""
    module, mesh = original(), mesh_of(1, 1, 8)
    config = module.OriginalStep(model=MODEL, optimizer=OPTIMIZER)
    with use_mesh(mesh):
        shape = (1, PARTS, LENGTH)
        tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=module.batch_sharding(mesh))
        step = module.compile_step(config)
        text = step.lower(module.abstract_state(config, mesh), tokens, tokens).compile().as_text()
    stream = f"f32[{LENGTH},{MODEL.d_model}]"
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    assert sum(line.count(stream) for line in sums) == 3 * MODEL.num_layers + 2
