"""meshlm plan"""

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal

from meshlm.core.errors import UsageError
from meshlm.core.sharding import (
    DEFAULT_RULES,
    RULES,
    MeshConfig,
    Rules,
    ShardingName,
    mesh_of_all,
    use_rules,
)
from meshlm.model.compute import Compute, ReduceDtype, Remat, choose_compute
from meshlm.model.config import ModelConfig
from meshlm.model.presets import find_preset
from meshlm.ops.fast_attention import AttentionName
from meshlm.optim import OptimizerConfig, OptimizerName
from meshlm.planning.plan import Plan, make_plan
from meshlm.planning.search import nearest_that_fits, search
from meshlm.planning.setup import Setup
from meshlm.planning.text import render_plan, render_search, render_verdict
from meshlm.planning.topology import Topology, find_topology
from meshlm.planning.work import Attended, best_attention, check_form
from meshlm.step import StepConfig

EXAMPLES = (
    "meshlm plan --preset gpt-j-6b --topology v3:16x8 --mesh.data 32 --mesh.model 8",
    "meshlm plan --preset gpt-j-6b --topology v5e:16x16 --batch-size 512 --search",
    "meshlm plan --preset 1.3b --topology H100:8 --batch-size 64 --json",
    "meshlm plan --preset 125m --topology here --no-compile",
)
_BEST = 3
_TELL_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tell what a training step will need and take on devices that need not be here."""

    preset: str
    """Shape of the model: test, demo, 125m, 350m, 1.3b, 2.7b, gpt-j-6b, 23b."""
    topology: str = "here"
    """Devices: v3:16x8 (chips of a TPU; v2 to v6e, v7x; 2xv5e:16x16 for two slices), H100:8, A100,
    H200, B200, or here."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sharding: ShardingName | None = None
    """Rules by which arrays are split over the mesh. [fsdp-tensor]"""
    batch_size: int | None = None
    """Sequences in one step, over all devices and parts. [one a device and part]"""
    seq_len: int | None = None
    """Tokens in a sequence. [the preset's context length]"""
    accumulate: int = 1
    """Parts into which a step's batch is cut to save memory."""
    remat: Remat | None = None
    """What is computed again to save memory. [none; minimal for split weights; full from 1e9]"""
    attention: AttentionName | None = None
    """Form of attention. [the best that these devices can]"""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Operands of the matrix products."""
    reduce_dtype: ReduceDtype = "float32"
    """Gradients of matrices but the embedding's are summed over devices in it."""
    optimizer: OptimizerName = "adamw"
    """adafactor keeps no moments as large as the weights."""
    vocab_size: int | None = None
    """Rows of the embedding and head. [the preset's]"""
    document_mask: bool = False
    """Tokens see only their own document."""
    search: bool = False
    """Rank meshes, rules, remat and parts, and batch sizes where none is given."""
    no_compile: bool = False
    """Formulas alone: at once, and less exact."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> None:
    """Prints the plan, or the search; that something does not fit is an answer too: exit code 0."""
    topology = find_topology(config.topology, config.compute_dtype)
    setup = _setup(config, topology)
    if config.search:
        _search(config, setup, topology)
        return
    compile = not config.no_compile
    with _clock(compile and topology.compiles):
        plan = make_plan(setup, topology, compile=compile)
    nearest = None
    if plan.fits is False:
        with _clock(plan.compiled is not None):
            nearest = nearest_that_fits(plan, compile=compile)
    if config.json:
        print(json.dumps(_with_nearest(plan, nearest), indent=2, allow_nan=False))
        return
    print(render_plan(plan))
    print(render_verdict(plan, nearest))
    if plan.compiled is None and compile:
        print(_how_to_compile(topology))


def _setup(config: Config, topology: Topology) -> Setup:
    model = find_preset(config.preset)
    if config.vocab_size is not None:
        model = dataclasses.replace(model, vocab_size=config.vocab_size)
    sharding = config.sharding or DEFAULT_RULES.name
    mesh = config.mesh
    if mesh.num_devices == 1:
        mesh = mesh_of_all(sharding, topology.num_devices, topology.slices)
    for name in ("accumulate", "batch_size", "seq_len"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    # What a schedule is made of changes no byte and no FLOP.
    optimizer = OptimizerConfig(
        name=config.optimizer,
        learning_rate=0.0,
        end_learning_rate=0.0,
        warmup_steps=0,
        anneal_steps=0,
    )
    setup = Setup(
        step=StepConfig(
            model=model,
            optimizer=optimizer,
            compute=_compute(config, model, topology, mesh, RULES[sharding]),
            accumulate=config.accumulate,
        ),
        mesh=mesh,
        sharding=sharding,
        batch_size=config.batch_size or 1,
        seq_len=config.seq_len or model.context_length,
        document_mask=config.document_mask,
    )
    if config.batch_size is None:
        rows = mesh.shards(setup.rules.batch) * config.accumulate
        setup = dataclasses.replace(setup, batch_size=rows)
    return setup


def _compute(
    config: Config, model: ModelConfig, topology: Topology, mesh: MeshConfig, rules: Rules
) -> Compute:
    """Returns how `meshlm train` computes the step on these devices."""
    with use_rules(rules):
        compute = choose_compute(
            model,
            mesh,
            dtype=config.compute_dtype,
            remat=config.remat,
            reduce_dtype=config.reduce_dtype,
        )
    asked = Attended(
        head_dim=model.head_dim, dtype=config.compute_dtype, documents=config.document_mask
    )
    if config.attention is not None:
        check_form(config.attention, topology, asked)
    attention = config.attention or best_attention(topology, asked)
    return dataclasses.replace(compute, attention=attention)


def _search(config: Config, setup: Setup, topology: Topology) -> None:
    plans = search(
        setup,
        topology,
        batch_is_open=config.batch_size is None,
        compile_best=0 if config.no_compile else _BEST,
        tell=_tell,
    )
    if config.json:
        print(json.dumps({"plans": [plan.to_json() for plan in plans]}, indent=2, allow_nan=False))
    else:
        print(render_search(plans), end="")


def _with_nearest(plan: Plan, nearest: Plan | None) -> dict:
    return plan.to_json() | {"nearest": None if nearest is None else nearest.to_json()}


def _how_to_compile(topology: Topology) -> str:
    if topology.facts.platform == "tpu":
        return "formulas alone: with `pip install 'meshlm[plan]'` the compiler itself is asked"
    return f"formulas alone: nothing here compiles for {topology.device_kind}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _clock(runs: bool) -> Iterator[None]:
    """Tells on stderr every ten seconds how long the compiler has been at work."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_TELL_EVERY_S):
            _tell(f"compiling: {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=tell, daemon=True)
    if runs:
        thread.start()
    try:
        yield
    finally:
        done.set()
