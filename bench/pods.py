"""Predicts GPT-J on pods that are not here, next to the original's own step: `bench/pods.py`.

Compiles the very training step for v3-256 and other TPU pods on this machine's CPU, the original's
step (bench/original_pod.py) for v3-256 too, and writes what the compiler and the model of
`meshlm plan` say: a JSON file into bench/results, and its tables into docs/pods.md. No pod runs
anything: every time and every MFU is a prediction.

`--small` does the same with tiny shapes on pods of eight devices and writes no page. It needs the
compiler: pip install 'meshlm[plan]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
# Of the process that asks; the compiler has processes of its own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pods_tables
from common import say
from meshlm.core.config import from_dict, to_dict
from meshlm.core.sharding import MeshConfig
from meshlm.model.compute import Compute, Remat
from meshlm.model.config import ModelConfig
from meshlm.model.families import gpt_j
from meshlm.model.presets import PRESETS
from meshlm.optim import OptimizerConfig
from meshlm.planning.compiling import HOW_TO_COMPILE, Compiled
from meshlm.planning.plan import Plan, make_plan
from meshlm.planning.prediction import predict
from meshlm.planning.search import describe_setup, search
from meshlm.planning.setup import Setup
from meshlm.planning.topology import Topology, find_topology
from meshlm.planning.work import Attended, best_attention
from meshlm.step import StepConfig
from original_pod import compile_original

# Ways to recompute of which the best is compiled for the comparison.
REMATS: tuple[Remat, ...] = ("minimal", "feed-forward", "full")
# As the original was trained; it changes neither memory nor time.
OPTIMIZER = OptimizerConfig(
    learning_rate=1.2e-4, end_learning_rate=1.2e-5, warmup_steps=3000, anneal_steps=300_000
)
Z_LOSS = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """All that is planned and compiled."""

    models: dict[str, ModelConfig]
    preset: str
    """Of the comparison with the original, and of the compile times."""
    topology: str
    """Of the same."""
    shards: int
    """The original's; its copies share the rest of the devices, and a part is a sequence each."""
    batch_size: int
    """Sequences in a step of the comparison."""
    seq_len: int
    pods: tuple[tuple[str, str, int], ...]
    """Presets, topologies and sequences in a step for which the best way is searched."""
    other_depth: int
    """Layers of the model whose compile time is compared with that of `preset`."""


LARGE = Study(
    models=PRESETS,
    preset="gpt-j-6b",
    topology="v3:16x8",
    shards=8,
    batch_size=512,
    seq_len=2048,
    pods=(
        ("gpt-j-6b", "v4:4x4x8", 512),
        ("gpt-j-6b", "v4:4x4x8", 1024),
        ("gpt-j-6b", "v5e:16x16", 512),
        ("gpt-j-6b", "v5e:16x16", 1024),
        ("gpt-j-6b", "v5p:4x4x8", 512),
        ("gpt-j-6b", "v5p:4x4x8", 1024),
        ("gpt-j-6b", "v6e:16x16", 512),
        ("gpt-j-6b", "v6e:16x16", 1024),
        ("23b", "v3:16x8", 512),
        ("23b", "v5p:4x4x8", 512),
    ),
    other_depth=14,
)
_TINY = gpt_j(
    num_layers=4,
    d_model=256,
    num_heads=4,
    head_dim=128,
    d_ff=1024,
    vocab_size=1024,
    context_length=128,
    rotary_dim=16,
)
SMALL = Study(
    models={"tiny": _TINY},
    preset="tiny",
    topology="v3:2x2",
    shards=4,
    batch_size=16,
    seq_len=128,
    pods=(("tiny", "v5e:2x4", 32),),
    other_depth=2,
)
# Compiles of one search.
MOST_TRIES = 3
# Share of the memory that a step may take by formula before it is worth a compile.
ROOM = 0.9


def setup_of(study: Study, preset: str, topology: Topology, **changes: Any) -> Setup:
    """One step of the study's batch, FSDP over all devices with all of it computed again."""
    model = study.models[preset]
    attention = best_attention(topology, Attended(head_dim=model.head_dim))
    step = StepConfig(
        model=model,
        optimizer=OPTIMIZER,
        # As the original summed them.
        compute=Compute(remat="full", attention=attention, reduce_dtype="bfloat16"),
        z_loss=Z_LOSS,
    )
    setup = Setup(
        step=step,
        mesh=MeshConfig(data=topology.num_devices),
        sharding="fsdp",
        batch_size=study.batch_size,
        seq_len=study.seq_len,
    )
    return dataclasses.replace(setup, **changes)


def original(study: Study) -> Iterator[Plan]:
    """The original's step, planned as ours are: its weights are split over `model` alone."""
    topology = find_topology(study.topology)
    copies = topology.num_devices // study.shards
    setup = setup_of(
        study,
        study.preset,
        topology,
        mesh=MeshConfig(data=copies, model=study.shards),
        sharding="tensor",
    )
    compute = dataclasses.replace(setup.step.compute, attention="plain")
    parts = study.batch_size // copies
    step = dataclasses.replace(setup.step, compute=compute, accumulate=parts)
    setup = dataclasses.replace(setup, step=step)
    say(f"the original's step for {topology.name}")
    yield predicted(setup, topology, compile_original(setup, topology))


def predicted(setup: Setup, topology: Topology, compiled: Compiled) -> Plan:
    """The plan of a setup for which the compiler has been asked already."""
    plan = make_plan(setup, topology, compile=False)
    prediction = predict(setup, topology, compiled)
    return dataclasses.replace(plan, compiled=compiled, prediction=prediction)


def ours(study: Study) -> Iterator[Plan]:
    """The best of each way to recompute, and the best on the original's own mesh."""
    topology = find_topology(study.topology)
    ranked = search(setup_of(study, study.preset, topology), topology)
    mesh = MeshConfig(data=topology.num_devices // study.shards, model=study.shards)
    like_theirs = [plan for plan in ranked if plan.setup.mesh == mesh]
    choices = [
        [plan for plan in ranked if plan.setup.step.compute.remat == remat] for remat in REMATS
    ]
    for choice in (*choices, like_theirs):
        yield from first_that_fits(choice)


def pods(study: Study) -> Iterator[Plan]:
    """The best way by formula on each pod that the compiler takes."""
    for preset, name, batch_size in study.pods:
        topology = find_topology(name)
        setup = setup_of(study, preset, topology, batch_size=batch_size)
        yield from first_that_fits(search(setup, topology))


def depth(study: Study) -> Iterator[Plan]:
    """The same step of a model with another number of layers and of the model itself."""
    topology = find_topology(study.topology)
    setup = setup_of(study, study.preset, topology)
    shallow = dataclasses.replace(setup.step.model, num_layers=study.other_depth)
    for model in (shallow, setup.step.model):
        step = dataclasses.replace(setup.step, model=model)
        yield compile_plan(dataclasses.replace(setup, step=step), topology)


def first_that_fits(ranked: list[Plan]) -> Iterator[Plan]:
    """The fastest plan that the compiler takes; none where it takes none of the first few.

    What fits by formula may be refused; then the next one is to need clearly less.
    """
    limit = float("inf")
    for _ in range(MOST_TRIES):
        less = [found for plan in ranked for found in in_parts(plan, ROOM * limit)]
        if not less:
            return
        best = min(less, key=lambda plan: plan.prediction.step_s if plan.prediction else 0.0)
        found = compile_plan(best.setup, best.topology)
        if found.fits:
            yield found
            return
        limit = best.peak_bytes


def in_parts(plan: Plan, limit: float) -> Iterator[Plan]:
    """The plan with as many parts a step as bring it under the limit, and into the memory."""
    limit = min(limit, ROOM * (plan.available_bytes or limit))
    # Copies of the weights are for several pods.
    while plan.setup.sharding != "replica-fsdp":
        if plan.peak_bytes < limit:
            yield plan
            return
        if plan.setup.rows % 2:
            return
        step = dataclasses.replace(plan.setup.step, accumulate=2 * plan.setup.step.accumulate)
        setup = dataclasses.replace(plan.setup, step=step)
        plan = make_plan(setup, plan.topology, compile=False)


def compile_plan(setup: Setup, topology: Topology) -> Plan:
    """The plan of a setup, compiled."""
    say(f"{setup.step.model.num_layers} layers for {topology.name}: {describe_setup(setup)}")
    plan = make_plan(setup, topology)
    assert plan.compiled is not None
    verdict = "fits" if plan.fits else "refused"
    say(f"  {verdict}, compiled in {plan.compiled.compile_s:.0f} s")
    return plan


SECTIONS: dict[str, Callable[[Study], Iterator[Plan]]] = {
    "original": original,
    "ours": ours,
    "pods": pods,
    "depth": depth,
}


def describe(study: Study, plan: Plan) -> dict[str, Any]:
    """The plan as JSON, with the model's name and depth."""
    model = plan.setup.step.model
    names = [name for name, preset in study.models.items() if preset == model]
    found = {
        "preset": names[0] if names else study.preset,
        "layers": model.num_layers,
        **plan.to_json(),
        "setup": to_dict(plan.setup),
        "compiled": to_dict(plan.compiled),
    }
    del found["collectives"]  # they are the compiler's
    return found


def predict_again(study: Study, section: dict[str, Any]) -> dict[str, Any]:
    """A section with every prediction made anew, from what the compiler said then."""
    plans = []
    for old in section["plans"]:
        setup = from_dict(Setup, old["setup"], "setup")
        compiled = from_dict(Compiled, old["compiled"], "compiled")
        plans.append(describe(study, predicted(setup, find_topology(old["topology"]), compiled)))
    return {**section, "plans": plans}


def make(study: Study, name: str) -> Iterator[dict[str, Any]]:
    """One section of the result, once more with each plan that is added to it."""
    plans: list[dict[str, Any]] = []
    for plan in SECTIONS[name](study):
        assert plan.compiled is not None
        plans.append(describe(study, plan))
        yield {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "jax": plan.compiled.jax_version,
            "libtpu": plan.compiled.libtpu_version,
            "cores": len(os.sched_getaffinity(0)),
            "plans": plans,
        }


def keep(name: str, section: dict[str, Any]) -> None:
    """Puts a section beside the others of the last result, into today's, and into the page."""
    last = pods_tables.latest_result()
    result = json.loads(last.read_text()) if last else {"benchmark": "pods", "predictions": True}
    result[name] = section
    today = datetime.datetime.now(datetime.UTC).date()
    path = pods_tables.RESULTS / f"pods-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    pods_tables.write_page(result)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/pods.py", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes; no page is written")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, help="make these anew, keep the rest"
    )
    parser.add_argument(
        "--predict", action="store_true", help="predict anew from the last result, compile nothing"
    )
    given = parser.parse_args()
    study = SMALL if given.small else LARGE
    if not find_topology(study.topology).compiles:
        parser.error(f"there is no compiler for TPUs here: {HOW_TO_COMPILE}")
    if given.small:
        print(json.dumps({name: list(make(study, name))[-1] for name in SECTIONS}))
        return
    last = pods_tables.latest_result()
    old = json.loads(last.read_text()) if last and given.predict else {}
    for name in given.only or SECTIONS:
        # A compile takes minutes: what is there is kept at once.
        again = (predict_again(study, old[name]),) if given.predict else make(study, name)
        for section in again:
            keep(name, section)


if __name__ == "__main__":
    main()
