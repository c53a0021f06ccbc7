"""The search: what it tries, how it ranks, what it compiles."""

from __future__ import annotations

import dataclasses

import pytest

from meshlm.core.errors import UsageError
from meshlm.planning import plan as planning
from meshlm.planning.compiling import Compiled
from meshlm.planning.plan import make_plan
from meshlm.planning.search import describe_setup, search
from meshlm.planning.setup import check_setup
from meshlm.planning.text import render_search
from meshlm.planning.topology import find_topology
from planned import setup_of

V3 = find_topology("v3:4x4")
BASE = setup_of(data=32, batch_size=64)


@pytest.fixture(scope="module")
def ranked():
    return search(BASE, dataclasses.replace(V3, compiles=False))


def test_everything_fits_and_uses_all_devices(ranked):
    assert len(ranked) > 10
    for found in ranked:
        assert found.fits
        assert found.setup.mesh.num_devices == 32
        assert found.setup.batch_size == 64
        check_setup(found.setup)
    assert {p.setup.sharding for p in ranked} >= {"fsdp", "fsdp-tensor"}
    assert {p.setup.step.compute.remat for p in ranked} >= {"minimal", "full"}


def test_the_fastest_comes_first(ranked):
    seconds = [p.prediction.step_s for p in ranked]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]
    # Of the same mesh, rules and remat only one: with the parts that are fastest.
    keys = [(p.setup.sharding, p.setup.mesh, p.setup.step.compute.remat) for p in ranked]
    assert len(keys) == len(set(keys))


def test_no_neighbour_by_hand_is_better(ranked):
    """What the search must have seen: pure FSDP and 16 x 2, with each remat."""
    for sharding, mesh in (("fsdp", {"data": 32}), ("fsdp-tensor", {"data": 16, "model": 2})):
        for remat in ("minimal", "full"):
            setup = setup_of(sharding=sharding, remat=remat, batch_size=64, accumulate=2, **mesh)
            found = make_plan(setup, V3, compile=False)
            if found.fits:
                assert ranked[0].prediction.step_s <= found.prediction.step_s


def test_batch_sizes_are_tried_where_none_is_given():
    found = search(BASE, dataclasses.replace(V3, compiles=False), batch_is_open=True)
    assert {p.setup.batch_size for p in found} >= {32, 64, 128}
    paces = [p.prediction.step_s / p.setup.tokens for p in found]
    assert paces == sorted(paces)


def test_the_best_are_compiled(monkeypatch, ranked):
    said, asked = [], []

    def answer(setup, topology):
        asked.append(setup)
        # The first that is compiled does not fit after all.
        return Compiled(fits=len(asked) > 1, flops=1e15, compile_s=1.0)

    monkeypatch.setattr(planning, "compile_setup", answer)
    topology = dataclasses.replace(V3, compiles=True)
    found = search(BASE, topology, compile_best=3, tell=said.append)
    assert asked == [p.setup for p in ranked[:4]]
    assert [text.partition(":")[0] for text in said] == [
        f"compiling {n} of 3" for n in (1, 1, 2, 3)
    ]
    assert [p.compiled is not None for p in found[:4]] == [True, True, True, False]
    assert ranked[0].setup not in [p.setup for p in found]


def test_no_more_are_compiled_than_makes_sense(monkeypatch, ranked):
    asked = []

    def refuse(setup, topology):
        asked.append(setup)
        return Compiled(fits=False)

    monkeypatch.setattr(planning, "compile_setup", refuse)
    found = search(BASE, dataclasses.replace(V3, compiles=True), compile_best=2)
    assert len(asked) == 4
    assert [p.setup for p in found] == [p.setup for p in ranked[4:]]


def test_replica_takes_the_slices():
    two = dataclasses.replace(find_topology("2xv5e:4x4"), compiles=False)
    plans = search(BASE, two)
    assert {p.setup.mesh.num_devices for p in plans} == {32}
    assert {p.setup.mesh.replica % 2 for p in plans} == {0}
    assert {p.setup.sharding for p in plans} >= {"fsdp", "fsdp-tensor", "replica-fsdp"}


def test_nothing_fits():
    small = dataclasses.replace(find_topology("v3:1x1"), compiles=False)
    with pytest.raises(UsageError, match="nothing fits on v3:1x1"):
        search(setup_of(data=2, batch_size=2), small)


def test_the_table(ranked):
    text = render_search(ranked, 3)
    lines = text.splitlines()
    assert len(lines) == 1 + 3 + 2
    assert describe_setup(ranked[0].setup) in lines[1]
    assert "Predictions, not measurements; MFU of 61.5 TFLOP/s a device" in text
    assert f"{len(ranked)} setups fit" in text


def test_setups_as_options():
    setup = setup_of(data=4, model=2, remat="minimal", accumulate=3, batch_size=24)
    assert describe_setup(setup) == (
        "--sharding fsdp-tensor --mesh.data 4 --mesh.model 2 --remat minimal --accumulate 3 "
        "--batch-size 24"
    )
    # With --sharding alone a run would take all devices.
    assert describe_setup(setup_of(batch_size=8)) == ("--remat full --accumulate 1 --batch-size 8")
