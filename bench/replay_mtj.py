"""Carries a recorded run of the original on, and compares every step: `replay_mtj.py FOLDER`.

FOLDER has `config.json` (the original's), `full/step_0` (a checkpoint with Adam's state) and
`golden.npz` with the recording: `train_tokens` [steps, replicas, accumulation, T+1], and for each
step the loss and the gradient's norm, twice: `_f32`, without the original's cast to bfloat16, and
`_mtj`, as it trained. Later checkpoints, `full/step_N`, are gone on from as well.

The last line is JSON with the largest relative deviations from step 0 on, and from later steps; the
exit code is 1 where one from step 0 on is beyond its limit. Losses of the `_mtj` kind agree until a
sum in another order rounds a bfloat16 gradient the other way; from then on they scatter by a few
1e-4, however the rest is computed.

The original adds up its `_mtj` norm in bfloat16, one array of a shard after the other, and comes
out up to a few per cent low; it is compared with our gradients added up in the same way. What
`meshlm train` reports, the norm of the same gradients added up in float32, is in the JSON as
`grad_norm_mtj_exact`, without a limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshlm.conversion.loading import load_stacked
from meshlm.conversion.opening import open_source
from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.model.params import Params, abstract_params
from meshlm.model.transformer import Compute
from meshlm.optim import OptimizerConfig
from meshlm.step import StepBatch, StepConfig, TrainState, begin_state, loss_and_grads, train_step

LIMITS = {
    "train_loss_f32": 1e-4,
    "grad_norm_f32": 1e-4,
    "train_loss_mtj": 5e-4,
    "grad_norm_mtj": 3e-2,
}
Z_LOSS = 1e-4


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A folder's recording, and how its run was configured."""

    folder: Path
    shards: int
    accumulate: int
    optimizer: OptimizerConfig
    golden: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Recording:
        config = json.loads((folder / "config.json").read_text())
        with np.load(folder / "golden.npz") as file:
            golden = dict(file)
        return cls(
            folder=folder,
            shards=config["cores_per_replica"],
            accumulate=config["gradient_accumulation_steps"],
            optimizer=OptimizerConfig(
                learning_rate=config["lr"],
                end_learning_rate=config["end_lr"],
                warmup_steps=config["warmup_steps"],
                anneal_steps=config["anneal_steps"],
                weight_decay=config["weight_decay"],
                bias_shares=config["cores_per_replica"],
            ),
            golden=golden,
        )

    @property
    def num_steps(self) -> int:
        return len(self.golden["train_tokens"])

    def batch(self, step: int) -> StepBatch:
        """Rows in the order in which a step cuts them into the recorded parts."""
        tokens = self.golden["train_tokens"][step].astype(np.int32)
        rows = tokens.reshape(-1, tokens.shape[-1])
        return StepBatch(
            tokens=jnp.asarray(rows[:, :-1]),
            targets=jnp.asarray(rows[:, 1:]),
            loss_mask=jnp.ones((len(rows), rows.shape[1] - 1)),
            segment_ids=None,
        )


def load_state(recording: Recording, step: int, config: StepConfig) -> TrainState:
    """The state of a full checkpoint, and no drawn one before it."""
    source = open_source(recording.folder / "full" / f"step_{step}")
    abstract = abstract_params(config.model, make_mesh(MeshConfig()))
    params, mu, nu = (load_stacked(source, group, abstract) for group in ("params", "mu", "nu"))
    state = begin_state(config, params)
    optimizer = state.optimizer.copy()
    count = jnp.asarray(source.step, jnp.int32)
    optimizer["adam"] = optimizer["adam"]._replace(count=count, mu=mu, nu=nu)
    return replace(state, step=count, optimizer=optimizer)


def originals_norm(grads: Params, shards: int) -> jax.Array:
    """The global norm as the original adds it up: array by array and shard by shard, rounded."""
    total = jnp.zeros(())
    for shard in range(shards):
        part = jnp.zeros(())
        for leaf in _leaves_of_shard(grads, shard, shards):
            part = _rounded(part + _rounded(jnp.sum(_rounded(jnp.square(leaf)))))
        total = _rounded(total + part)
    return _rounded(jnp.sqrt(total))


def _rounded(x: jax.Array) -> jax.Array:
    """bfloat16 numbers in float32: the compiler may leave casts there and back out."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _leaves_of_shard(grads: Params, shard: int, shards: int) -> list[jax.Array]:
    """A shard's gradients in the original's order; norms have theirs in the first shard alone."""

    def piece(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.split(x, shards, axis)[shard]

    def norm(*arrays: jax.Array) -> list[jax.Array]:
        return list(arrays) if shard == 0 else []

    assert grads.embedding.bias is not None
    leaves = [grads.embedding.bias, piece(grads.embedding.tokens)]
    num_layers = grads.blocks.attention_norm.scale.shape[0]
    for layer in sorted(range(num_layers), key=str):
        b: Any = jax.tree.map(lambda x, layer=layer: x[layer], grads.blocks)
        readers = (b.attention.query, b.attention.value, b.attention.key)
        leaves += [piece(linear.weight) for linear in readers]
        leaves += [piece(b.attention.out.weight, 1)]
        up, down = b.feed_forward.up, b.feed_forward.down
        leaves += [piece(up.bias), piece(up.weight), down.bias, piece(down.weight, 1)]
        leaves += norm(b.attention_norm.offset, b.attention_norm.scale)
    leaves += [piece(grads.head.bias), piece(grads.head.weight)]
    return leaves + norm(grads.final_norm.offset, grads.final_norm.scale)


def replay(recording: Recording, kind: str, start: int) -> dict[str, float]:
    """The largest deviations from step `start` on, by the name of what deviates."""
    model = open_source(recording.folder / "full" / f"step_{start}").model
    config = StepConfig(
        model=model,
        optimizer=recording.optimizer,
        compute=Compute(dtype="float32"),
        accumulate=recording.accumulate,
        z_loss=Z_LOSS,
        weight_dtype="bfloat16" if kind == "mtj" else "float32",
    )

    @jax.jit
    def advance(state: TrainState, batch: StepBatch):
        grads = loss_and_grads(state.params, batch, config)[1]
        return *train_step(state, batch, config), grads

    @jax.jit
    def norm(grads: Params) -> jax.Array:
        whole = jax.tree.map(lambda g: g * recording.accumulate, grads)
        return originals_norm(whole, recording.shards)

    state = load_state(recording, start, config)
    worst: dict[str, float] = {}
    for step in range(start, recording.num_steps):
        state, metrics, grads = advance(state, recording.batch(step))
        # The recorded norm is taken before the division by the number of accumulated parts.
        exact = float(metrics.grad_norm) * recording.accumulate
        found = {f"train_loss_{kind}": float(metrics.loss), f"grad_norm_{kind}": exact}
        if kind == "mtj":
            found["grad_norm_mtj"] = float(norm(grads))
            found["grad_norm_mtj_exact"] = exact
        for name, value in found.items():
            wanted = recording.golden[name.removesuffix("_exact")][step]
            worst[name] = max(worst.get(name, 0.0), abs(value / wanted - 1))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    recording = Recording.read(parser.parse_args().folder)
    steps = {int(p.name.removeprefix("step_")) for p in (recording.folder / "full").glob("step_*")}
    later = sorted(steps - {0})
    deviations = {kind: replay(recording, kind, 0) for kind in ("f32", "mtj")}
    from_later = {f"step_{start}": replay(recording, "mtj", start) for start in later}
    for name, worst in (deviations | from_later).items():
        print(f"{name}: " + "  ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    from_start = deviations["f32"] | deviations["mtj"]
    good = all(from_start[name] <= limit for name, limit in LIMITS.items())
    result = {"deviations": from_start, "from_later": from_later, "limits": LIMITS, "good": good}
    print(json.dumps(result))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
