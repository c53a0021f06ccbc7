"""Which mesh, recomputation, parts and batch are best: ranked by formula, the best few compiled."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from meshlm.core.errors import UsageError
from meshlm.core.sharding import RULES, MeshConfig
from meshlm.model.compute import Compute, Remat
from meshlm.planning.plan import Plan, make_plan
from meshlm.planning.setup import Setup, check_setup
from meshlm.planning.topology import Topology

_REMATS: tuple[Remat, ...] = get_args(Remat)
_MOST_PARTS = 64
# Rows a device has in a step, where the batch is searched for too.
_ROWS = (1, 2, 4, 8, 16)
# Compiles that the search for a setup that fits may take: each is a minute or more.
_MOST_TRIES = 2
# Compiles that a search may take for each plan that is to come out compiled.
_MOST_COMPILED = 2


def search(
    setup: Setup,
    topology: Topology,
    *,
    batch_is_open: bool = False,
    compile_best: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Plan]:
    """Returns plans that fit, the fastest a token first.

    Args:
        setup: where mesh, rules, remat, parts are to be replaced; the batch stays.
        topology: the devices, all of which are used.
        batch_is_open: try batch sizes too.
        compile_best: how many of the best to have compiled; they come first, by what the compiler
            says. Those that it finds no room for are left out.
        tell: takes a line on what goes on.

    Raises:
        UsageError: nothing fits.
    """
    sizes = (setup.batch_size,)
    if batch_is_open:
        sizes = tuple(rows * topology.num_devices for rows in _ROWS)
    plans = _distinct(_formula_plans(_variants(setup, topology, sizes), topology))
    ranked = sorted((plan for plan in plans if plan.fits is not False), key=_seconds_a_token)
    if not ranked:
        raise UsageError(
            f"nothing fits on {topology.name}, whatever the mesh: choose a smaller --preset or "
            "--batch-size, or a larger --topology"
        )
    if not (compile_best and topology.compiles):
        return ranked
    good: list[Plan] = []
    tried = 0
    for plan in ranked[: _MOST_COMPILED * compile_best]:
        if len(good) == compile_best:
            break
        tried += 1
        tell(f"compiling {len(good) + 1} of {compile_best}: {describe_setup(plan.setup)}")
        found = make_plan(plan.setup, topology)
        good += [] if found.fits is False else [found]
    return sorted(good, key=_seconds_a_token) + ranked[tried:]


def nearest_that_fits(plan: Plan, *, compile: bool = True) -> Plan | None:
    """Returns the plan with the fewest changes that fits on the same devices; None where none does.

    More parts first, then more recomputation, then another mesh or other rules; among equals the
    fastest by formula. The compiler has the last word where it was asked before.
    """
    setup, topology = plan.setup, plan.topology
    variants = _variants(setup, topology, (setup.batch_size,))
    fitting = [p for p in _formula_plans(variants, topology) if p.fits]
    ranked = sorted(fitting, key=lambda p: (_changes(setup, p.setup), _seconds_a_token(p)))
    if plan.compiled is None or not compile:
        return ranked[0] if ranked else None
    # What the formula took for fitting has been refused, so look for clearly less.
    limit = min(plan.memory.total_bytes, plan.available_bytes or 0)
    less = [p for p in ranked if p.memory.total_bytes < 0.9 * limit]
    for candidate in less[:_MOST_TRIES]:
        found = make_plan(candidate.setup, topology)
        if found.fits:
            return found
    return None


def describe_setup(setup: Setup) -> str:
    """Returns what a search varies, as options of `meshlm plan` and `meshlm train`.

    One device is what a run takes without both, and --sharding alone would take all.
    """
    sizes = {f"--mesh.{axis}": size for axis, size in dataclasses.asdict(setup.mesh).items()}
    options: dict[str, object] = {name: size for name, size in sizes.items() if size > 1}
    if options:
        options = {"--sharding": setup.sharding, **options}
    if setup.step.compute.reduce_dtype != Compute().reduce_dtype:
        options |= {"--reduce-dtype": setup.step.compute.reduce_dtype}
    options |= {
        "--remat": setup.step.compute.remat,
        "--accumulate": setup.step.accumulate,
        "--batch-size": setup.batch_size,
    }
    return " ".join(f"{name} {value}" for name, value in options.items())


def _variants(setup: Setup, topology: Topology, sizes: Sequence[int]) -> Iterator[Setup]:
    slices = topology.slices
    meshes = _meshes(topology.num_devices, slices)
    ways = itertools.product(RULES, meshes, _REMATS, _parts(), sizes)
    for sharding, mesh, remat, accumulate, batch_size in ways:
        if not _makes_sense(sharding, mesh, slices):
            continue
        compute = dataclasses.replace(setup.step.compute, remat=remat)
        step = dataclasses.replace(setup.step, compute=compute, accumulate=accumulate)
        variant = dataclasses.replace(
            setup, step=step, mesh=mesh, sharding=sharding, batch_size=batch_size
        )
        try:
            check_setup(variant)
        except UsageError:
            continue
        yield variant


def _meshes(devices: int, slices: int) -> Iterator[MeshConfig]:
    """Every data x model within a slice, and replica x data, of so many devices."""
    for size in range(1, devices // slices + 1):
        if devices // slices % size == 0:
            yield MeshConfig(replica=slices, data=devices // slices // size, model=size)
            if size > 1:
                yield MeshConfig(replica=slices * size, data=devices // slices // size)


def _parts() -> Iterable[int]:
    return (2**power for power in range(_MOST_PARTS.bit_length()))


def _makes_sense(sharding: str, mesh: MeshConfig, slices: int) -> bool:
    """False where other rules with the same mesh, or the same rules with another, are the same."""
    if sharding in ("data", "fsdp"):
        return mesh.model == 1 and mesh.replica == slices
    if sharding == "replica-fsdp":
        return mesh.model == 1 and mesh.replica > 1 and mesh.data > 1
    if sharding == "tensor":
        return mesh.replica == slices and mesh.model > 1
    return mesh.replica == slices and mesh.model > 1 and mesh.data > 1


def _formula_plans(variants: Iterable[Setup], topology: Topology) -> Iterator[Plan]:
    for variant in variants:
        yield make_plan(variant, topology, compile=False)


def _distinct(plans: Iterable[Plan]) -> list[Plan]:
    """Returns of each mesh, rules, remat and batch the fastest that fits: fewest parts."""
    best: dict[tuple, Plan] = {}
    for plan in plans:
        setup = plan.setup
        key = (setup.sharding, setup.mesh, setup.step.compute.remat, setup.batch_size)
        if plan.fits is False:
            continue
        if key not in best or _seconds_a_token(plan) < _seconds_a_token(best[key]):
            best[key] = plan
    return list(best.values())


def _seconds_a_token(plan: Plan) -> float:
    if plan.prediction is None:
        return float(plan.peak_bytes)
    return plan.prediction.step_s / plan.setup.tokens


def _changes(old: Setup, new: Setup) -> tuple[int, int, int, int]:
    """Returns how far a setup is from another, the dearest change first."""
    return (
        int(old.mesh != new.mesh),
        int(old.sharding != new.sharding),
        int(old.step.compute.remat != new.step.compute.remat),
        int(old.step.accumulate != new.step.accumulate),
    )
