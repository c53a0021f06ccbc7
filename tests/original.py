"""Checkpoints as the original's code would write them, made by JAX and numpy alone.

The leaves are those of a nested dict with Haiku's names, flattened by JAX; nothing here knows the
order or the layout that `meshlm.conversion` has in its tables.
"""

import json
import subprocess
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import zstandard

from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Adam = namedtuple("Adam", "count mu nu")
Schedule = namedtuple("Schedule", "count")
Empty = namedtuple("Empty", "")


def make_trees(
    model: ModelConfig, shards: int, dtype: Any, *, full: bool = False, step: int = 7, seed: int = 0
) -> list[dict[str, Any]]:
    """Returns the state of every shard."""
    rng = np.random.default_rng(seed)
    d, v, f = model.d_model, model.vocab_size // shards, 4 * model.d_model // shards
    heads = d // shards

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    def params() -> dict[str, Any]:
        root = "causal_transformer_shard/~/"
        norm = lambda: {"scale": draw(d), "offset": draw(d)}  # noqa: E731
        tree: dict[str, Any] = {
            root + "embedding_shard/~/linear": {"w": draw(v, d), "b": draw(d)},
            root + "projection_shard/~/linear": {"w": draw(d, v), "b": draw(v)},
            root + "projection_shard/~/replicated_layer_norm": norm(),
        }
        for i in range(model.num_layers):
            layer = f"{root}layer_{i}/~/"
            for name in ("linear", "linear_1", "linear_2"):
                tree[layer + name] = {"w": draw(d, heads)}
            tree[layer + "linear_3"] = {"w": draw(heads, d)}
            tree[layer + "linear_4"] = {"w": draw(d, f), "b": draw(f)}
            tree[layer + "linear_5"] = {"w": draw(f, d), "b": draw(d)}
            tree[layer + "replicated_layer_norm"] = norm()
        return tree

    def state() -> dict[str, Any]:
        result: dict[str, Any] = {"params": params(), "step": np.array(step, np.int32)}
        if full:
            adam = Adam(np.array(step + 1, np.int32), params(), params())
            schedule = Schedule(np.array(step - 3, np.int32))
            result["opt_state"] = (Empty(), Empty(), adam, Empty(), Empty(), schedule)
        return result

    return [state() for _ in range(shards)]


def leaf(trees: list[dict[str, Any]], module: str, name: str, group: str = "params") -> list:
    """Returns a leaf of every shard."""
    full_name = f"causal_transformer_shard/~/{module}"
    groups = [
        t["params"] if group == "params" else getattr(t["opt_state"][2], group) for t in trees
    ]
    return [g[full_name][name] for g in groups]


def write(folder: Path, trees: list[dict[str, Any]], savez: Any = np.savez) -> Path:
    """Writes a step's folder, and returns it."""
    step_folder = folder / f"step_{int(trees[0]['step'])}"
    for shard, tree in enumerate(trees):
        leaves = jax.tree_util.tree_leaves(tree)
        path = step_folder / f"shard_{shard}"
        path.mkdir(parents=True)
        for i, numbers in enumerate(np.array_split(np.arange(len(leaves)), 16)):
            with open(path / f"{i}.npz", "wb") as file:
                savez(file, *(leaves[n] for n in numbers))
    return step_folder


def savez_to_bucket(file: Any, *arrays: np.ndarray) -> None:
    """`np.savez` to a file that cannot seek, as one in a bucket: sizes follow the bytes."""

    class Unseekable:
        def write(self, data: bytes) -> int:
            return file.write(data)

        def flush(self) -> None:
            pass

        def read(self) -> bytes:
            raise OSError

    np.savez(Unseekable(), *arrays)  # pyright: ignore[reportArgumentType]


def settings(model: ModelConfig, **others: Any) -> dict[str, Any]:
    """Returns the original's config."""
    return {
        "layers": model.num_layers,
        "d_model": model.d_model,
        "n_heads": model.num_heads,
        "n_vocab": model.vocab_size,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": model.rotary_dim,
        "seq": model.context_length,
        **others,
    }


def write_config(path: Path, model: ModelConfig, **others: Any) -> None:
    """Writes the original's config."""
    path.write_text(json.dumps(settings(model, **others)) + "\n")


def small(num_layers: int = 2, num_heads: int = 4, vocab_size: int = 24) -> ModelConfig:
    """Returns a model whose checkpoints are small."""
    return gpt_j(
        num_layers=num_layers,
        d_model=4 * num_heads,
        num_heads=num_heads,
        head_dim=4,
        d_ff=16 * num_heads,
        vocab_size=vocab_size,
        context_length=16,
        rotary_dim=2,
        embedding_bias=True,
    )


def pack(archive: Path, folder: Path, *names: str) -> Path:
    """Packs parts of a folder with the machine's own tar, as the published archives were."""
    tar = subprocess.run(
        ["tar", "-C", str(folder), "-cf", "-", *names], check=True, capture_output=True
    ).stdout
    archive.write_bytes(zstandard.compress(tar))
    return archive


def pack_members(archive: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Packs members that may be anything, and state any size."""
    blocks = []
    for info, data in members:
        info.size = info.size or len(data)
        blocks += [info.tobuf(tarfile.GNU_FORMAT), data, bytes(-len(data) % 512)]
    archive.write_bytes(zstandard.compress(b"".join((*blocks, bytes(1024)))))
    return archive
