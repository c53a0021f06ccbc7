"""Topologies by name: their size and data sheet, and where the mesh's axes lie on them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

from meshlm.core.errors import UsageError
from meshlm.core.placement import Place, place_devices
from meshlm.core.platform import has_tpu_compiler
from meshlm.core.sharding import MeshConfig
from meshlm.planning import topology as module
from meshlm.planning.compiling import _WITHOUT_TPUS
from meshlm.planning.topology import (
    axes_on_torus,
    check_devices,
    compiler_name,
    find_topology,
)

needs_compiler = pytest.mark.skipif(
    not has_tpu_compiler(), reason="libtpu is not installed (extra plan)"
)


# Devices, dense bf16 TFLOP/s and GiB of each, by the makers' data sheets.
@pytest.mark.parametrize(
    ("name", "devices", "teraflops", "gibibytes"),
    [
        ("v2:4x4", 32, 22.5, 8),
        ("v3:16x8", 256, 61.5, 16),
        ("v4:4x4x8", 128, 275, 32),
        ("v5e:16x16", 256, 197, 16),
        ("v5p:4x8x8", 256, 459, 95),
        ("v6e:16x16", 256, 918, 32),
        ("v7x:2x2x1", 8, 1153.5, 96),
        ("2xv5e:16x16", 512, 197, 16),
        ("32xv3:2x2", 256, 61.5, 16),
        ("A100:8", 8, 312, 80),
        ("H100:64", 64, 989, 80),
        ("H200:8", 8, 989, 141),
        ("B200:16", 16, 2250, 180),
    ],
)
def test_the_devices_of_a_name(name, devices, teraflops, gibibytes):
    found = find_topology(name)
    assert found.num_devices == found.facts.count == devices
    assert found.facts.peak_flops == teraflops * 1e12
    assert found.facts.memory_bytes == gibibytes << 30
    assert found.facts.platform == ("gpu" if name[0] in "ABH" else "tpu")
    assert math.prod(found.chips) * found.devices_per_chip == (
        devices // found.slices if found.chips else 1
    )


# GB/s of all links of a chip in one direction, as the makers give it: v4, v5e and v6e 2,400, 1,600
# and 3,200 Gbit/s; v5p and v7x 1,200 GB/s in both directions, NVLink 600, 900 and 1,800.
@pytest.mark.parametrize(
    ("name", "gigabytes_per_s"),
    [
        ("v4:4x4x4", 2400 / 8),
        ("v5e:4x4", 1600 / 8),
        ("v5p:4x4x4", 1200 / 2),
        ("v6e:4x4", 3200 / 8),
        ("v7x:4x4x4", 1200 / 2),
        ("A100:8", 600 / 2),
        ("H100:8", 900 / 2),
        ("B200:8", 1800 / 2),
    ],
)
def test_the_links_of_a_chip(name, gigabytes_per_s):
    links = find_topology(name).interconnect
    assert links.link_bytes_per_s is not None
    assert links.links * links.link_bytes_per_s == gigabytes_per_s * 1e9


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v3:16x8", (False, False)),
        ("v3:32x32", (True, True)),
        ("v3:32x16", (True, False)),
        ("v2:16x16", (True, True)),
        ("v5e:16x16", (True, True)),
        ("v6e:8x16", (False, True)),
        ("v4:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
    ],
)
def test_rings_are_where_a_dim_is_the_pods_or_cubes_are_whole(name, wraps):
    assert find_topology(name).wraps == wraps


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "v3:16x8"),
        ("v9:4x4", "v3:16x8"),
        ("V3:16x8", "v3:16x8"),
        ("v3", "2 dims, as v3:4x4"),
        ("v3:256", "2 dims, as v3:4x4"),
        ("v3:16x8x1", "2 dims"),
        ("v5p:16x16", "3 dims, as v5p:4x4x4"),
        ("v3:0x8", "2 dims"),
        ("v3:-4x8", "2 dims"),
        ("v3: 4x8", "2 dims"),
        ("v5e:32x32", "256"),
        ("H100", "H100:8"),
        ("H100:0", "H100:8"),
        ("H100:8x8", "H100:8"),
        ("here:2", "v3:16x8"),
        ("0xv5e:4x4", "v3:16x8"),
        ("2x v5e:4x4", "v3:16x8"),
        ("2xv5e", "2 dims, as 2xv5e:4x4"),
        ("2xv5e:32x32", "256"),
        ("257xv5e:4x4", "at most 256 slices"),
        ("2xH100:8", "v3:16x8"),
        ("2xhere", "v3:16x8"),
        ("1\u0662xv5e:4x4", "v3:16x8"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(name, hint):
    with pytest.raises(UsageError, match=hint) as error:
        find_topology(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_this_machine():
    here = find_topology("here")
    assert (here.num_devices, here.facts.platform, here.chips) == (8, "cpu", ())
    assert here.compiles
    # Measured: eight devices share one processor, between a slow laptop's and a large server's.
    assert 1e8 < here.facts.peak_flops < 1e14
    assert 1e7 < here.facts.bandwidth_bytes_per_s < 1e12
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert here.facts.memory_bytes == there // 8


@pytest.mark.parametrize("there", [True, False])
def test_tpus_compile_where_the_compiler_is(monkeypatch, there):
    monkeypatch.setattr(module, "has_tpu_compiler", lambda: there)
    assert find_topology("v3:2x2").compiles is there
    assert not find_topology("H100:8").compiles


# Where the axes lie.


@pytest.mark.parametrize(
    ("name", "data", "model", "extents"),
    [
        # A host of v3 is 2 x 2 chips of 2 cores; `data` goes from host to host.
        ("v3:16x8", 32, 8, {"data": (8, 4, 1), "model": (2, 2, 2)}),
        ("v3:16x8", 256, 1, {"data": (16, 8, 2), "model": (1, 1, 1)}),
        ("v5e:16x16", 16, 16, {"data": (16, 1, 1), "model": (1, 16, 1)}),
        ("v5e:16x16", 64, 4, {"data": (4, 16, 1), "model": (4, 1, 1)}),
        ("v6e:8x8", 16, 4, {"data": (2, 8, 1), "model": (4, 1, 1)}),
        ("v5p:4x8x8", 64, 4, {"data": (1, 8, 8, 1), "model": (4, 1, 1, 1)}),
        ("v4:4x4x4", 4, 16, {"data": (1, 1, 4, 1), "model": (4, 4, 1, 1)}),
    ],
)
def test_an_axis_takes_whole_dims_of_the_torus_where_it_can(name, data, model, extents):
    found = axes_on_torus(find_topology(name), MeshConfig(data=data, model=model))
    found = {axis: sizes for axis, sizes in found.items() if axis != "replica"}
    if name == "v5e:16x16" and data == model:  # which dim is whose does not matter
        found = {axis: tuple(sorted(sizes)) for axis, sizes in found.items()}
        extents = {axis: tuple(sorted(sizes)) for axis, sizes in extents.items()}
    assert found == extents


def slices_of(count: int) -> list[Place]:
    return module._places(find_topology(f"{count}xv5e:4x4"))


def test_slices_are_split_by_replica():
    placed = place_devices((2, 8, 2), slices_of(2))
    for replica in range(2):
        assert {device.slice_index for device in placed[replica].flat} == {replica}
    assert len({device.id for device in placed.flat}) == 32


def test_slices_that_replica_does_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"--mesh.replica 1: .* 2 slices.* multiple of 2"):
        place_devices((1, 16, 2), slices_of(2))


def test_hosts_of_gpus_are_no_slices():
    """JAX gives the GPUs of each host a slice of their own; any axis may lie over them."""
    gpus = [
        dataclasses.replace(place, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
        for place in slices_of(2)
    ]
    placed = place_devices((1, 32, 1), gpus)
    assert placed.shape == (1, 32, 1)
    assert {device.id for device in placed.flat} == {device.id for device in gpus}


def test_parts_of_slices_are_refused():
    with pytest.raises(UsageError, match=r"of 24 devices: of 2 slices.* all or none"):
        place_devices((2, 12, 1), slices_of(2)[:24])


@pytest.mark.parametrize(("replica", "data"), [(1, 32), (2, 8), (1, 16)])
def test_a_mesh_takes_whole_slices(replica, data):
    topology = find_topology("2xv5e:4x4")
    check_devices(MeshConfig(replica=2, data=16), topology)
    check_devices(MeshConfig(replica=4, data=8), topology)
    with pytest.raises(UsageError, match=r"--mesh.replica .* 2 slices.* multiple of 2"):
        check_devices(MeshConfig(replica=replica, data=data), topology)


def test_within_a_slice_axes_lie_as_on_one():
    sizes = {"data": 4, "model": 4}
    one = axes_on_torus(find_topology("v5e:4x4"), MeshConfig(**sizes))
    two = axes_on_torus(find_topology("2xv5e:4x4"), MeshConfig(replica=2, **sizes))
    assert two == one
    assert two["replica"] == (1, 1, 1)
    # Copies in the same slice lie beside each other.
    four = axes_on_torus(find_topology("2xv5e:4x4"), MeshConfig(replica=4, data=2, model=4))
    assert math.prod(four["replica"]) == 2


NAMES = (
    "v2:4x4",
    "v3:16x8",
    "v4:2x2x4",
    "v4:4x4x4",
    "v5e:4x8",
    "v5p:2x4x4",
    "v6e:2x4",
    "v7x:2x2x2",
    "2xv5e:4x4",
    "3xv4:2x2x2",
    "2xv7x:2x2x1",
)
LIST_DEVICES = """
import json, sys
import jax
from meshlm.planning.worker import target_devices
print(json.dumps({name: [
    [d.id, d.device_kind, list(d.coords), d.core_on_chip, d.process_index,
     getattr(d, "slice_index", 0)]
    for d in target_devices(name)
] for name in sys.argv[1:]}))
"""


@needs_compiler
def test_devices_are_placed_as_the_compiler_has_them():
    """Numbers, places, hosts and order of the devices: those of the compiler's own topologies."""
    finished = subprocess.run(
        [sys.executable, "-c", LIST_DEVICES, *NAMES],
        env={**os.environ, **_WITHOUT_TPUS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    listed = json.loads(finished.stdout)
    for name in NAMES:
        own = [
            [p.id, p.device_kind, list(p.coords), p.core_on_chip, p.process_index, p.slice_index]
            for p in module._places(find_topology(name))
        ]
        assert own == listed[name], name
        assert compiler_name(name)[0].partition(":")[2] == name.partition(":")[2]


def test_gpus_here_are_on_hosts_of_eight(monkeypatch):
    h100 = find_topology("H100:64")
    monkeypatch.setattr(module, "device_facts", lambda: h100.facts)
    found = find_topology("here")
    assert (found.num_devices, found.devices_per_host) == (64, 8)
