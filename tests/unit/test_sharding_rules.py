"""The rule table: what it splits, what it refuses, and the meshes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from meshlm.core import sharding
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig, make_mesh, partition, reshard, spec
from meshlm.core.tree import to_named
from meshlm.model.params import weight_tree
from tiny import CONFIG, mesh_of

P = PartitionSpec
EVERY = {"replica": 2, "data": 2, "model": 2}
# The whole split of the model, by hand. A leading None is the dim of the layers.
WEIGHTS = {
    "embedding.tokens": P(None, ("model", "data")),
    "blocks.attention_norm.scale": P(None, None),
    "blocks.attention_norm.offset": P(None, None),
    "blocks.attention.query.weight": P(None, "model", None, "data"),
    "blocks.attention.key.weight": P(None, "model", None, "data"),
    "blocks.attention.value.weight": P(None, "model", None, "data"),
    "blocks.attention.out.weight": P(None, "data", "model", None),
    "blocks.feed_forward.up.weight": P(None, "model", "data"),
    "blocks.feed_forward.up.bias": P(None, "model"),
    "blocks.feed_forward.down.weight": P(None, "data", "model"),
    "blocks.feed_forward.down.bias": P(None, None),
    "final_norm.scale": P(None),
    "final_norm.offset": P(None),
    "head.weight": P("model", "data"),
    "head.bias": P("model"),
}


def test_how_each_weight_is_split():
    found = {
        name: partition(*w.dims, sizes=EVERY) for name, w in to_named(weight_tree(CONFIG)).items()
    }
    assert found == WEIGHTS


def test_every_matrix_is_split_over_both_axes_and_none_over_replica():
    for name, weight in to_named(weight_tree(CONFIG)).items():
        axes = str(partition(*weight.dims, sizes=EVERY))
        assert "replica" not in axes, name
        if weight.decay:
            assert "data" in axes, name
            assert "model" in axes, name


def test_every_dim_of_a_weight_is_in_the_table_or_whole_on_purpose():
    dims = {dim for w in jax.tree.leaves(weight_tree(CONFIG)) for dim in w.dims if dim}
    assert dims - {f.name for f in dataclasses.fields(sharding.Rules)} == {"layers"}


def test_the_batch_is_split_over_replica_and_data():
    assert partition("batch", None, sizes=EVERY) == P(("replica", "data"), None)


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        (("ff", "embed"), P("model", None)),
        (("embed", "heads", None), P(None, "model", None)),
        ((None, "table_embed"), P(None, "model")),
        (("batch", None), P(("replica", "data"), None)),
        (("batch", None, "heads"), P(("replica", "data"), None, "model")),
    ],
)
def test_a_gathered_weight_is_whole_along_data_and_the_batch_stays_split(dims, wanted):
    assert partition(*dims, sizes=EVERY, gathered=True) == wanted


@pytest.mark.parametrize(
    ("dims", "axis"),
    [
        (("heads", "ff"), "model"),
        (("batch", "embed"), "data"),
        (("table_embed", "vocab"), "model"),
        (("embed", "embed"), "data"),
    ],
)
def test_two_dims_cannot_share_a_mesh_axis(dims, axis):
    with pytest.raises(ValueError, match=f"{dims[0]!r} and {dims[1]!r} are both .* axis '{axis}'"):
        partition(*dims, sizes=EVERY)


def test_gathering_frees_the_axis():
    assert partition("batch", "embed", sizes=EVERY, gathered=True) == P(("replica", "data"), None)


@pytest.mark.parametrize(
    ("unused", "batch", "table"),
    [
        ({"replica"}, P("data", None), P(None, ("model", "data"))),
        ({"data"}, P("replica", None), P(None, "model")),
        ({"model"}, P(("replica", "data"), None), P(None, "data")),
        ({"replica", "data", "model"}, P(None, None), P(None, None)),
    ],
)
def test_an_axis_of_one_device_splits_nothing(unused, batch, table):
    sizes = {axis: 1 if axis in unused else 4 for axis in EVERY}
    assert partition("batch", None, sizes=sizes) == batch
    assert partition(None, "table_embed", sizes=sizes) == table


def test_which_axes_split_something():
    assert not sharding.is_split()
    with jax.set_mesh(mesh_of(1, 4, 2)):
        assert sharding.is_split()
        assert sharding.axes_of("heads") == {"model"}
        assert sharding.axes_of("batch") == {"data"}
        assert sharding.axes_of("layers") == frozenset()
    with jax.set_mesh(mesh_of()):
        assert not sharding.is_split()


def test_without_a_mesh_nothing_is_split():
    x = jnp.ones((2, 3))
    assert spec("batch", "ff") is None
    assert reshard(x, "batch", "ff") is x


def test_in_a_mesh_arrays_are_split_as_the_table_says():
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert spec("batch", "ff") == P(("replica", "data"), "model")
        x = reshard(jnp.arange(32.0).reshape(4, 8), "batch", "ff")
    assert [shard.data.shape for shard in x.addressable_shards] == [(1, 4)] * 8
    assert jax.typeof(x).sharding.spec == P(("replica", "data"), "model")
    np.testing.assert_array_equal(x, np.arange(32.0).reshape(4, 8))
    placed = jax.device_put(np.arange(32.0), sharding.sharding_of(mesh_of(2, 2, 2), "embed"))
    assert {s.data.shape for s in placed.addressable_shards} == {(16,)}


def test_a_mesh_has_three_explicit_axes_in_the_devices_order():
    mesh = make_mesh(MeshConfig(replica=2, data=1, model=4))
    assert mesh.axis_names == ("replica", "data", "model")
    assert mesh.shape == {"replica": 2, "data": 1, "model": 4}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    # Tensor parallelism talks most: its devices are neighbours.
    assert [d.id for d in mesh.devices[0, 0]] == [0, 1, 2, 3]


def test_the_default_mesh_is_one_device():
    assert make_mesh().size == 1
    assert make_mesh(devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]


def test_a_mesh_may_use_some_of_the_devices():
    assert make_mesh(MeshConfig(data=3)).size == 3


def test_too_few_devices():
    with pytest.raises(UsageError) as caught:
        make_mesh(MeshConfig(replica=2, data=3, model=4))
    message = str(caught.value)
    assert "replica 2 x data 3 x model 4 wants 24 devices and 8 are here" in message
    assert "--mesh." in message
    assert "--xla_force_host_platform_device_count=24" in message
    assert "\n" not in message


@pytest.mark.parametrize("axis", ["replica", "data", "model"])
@pytest.mark.parametrize("size", [0, -2])
def test_an_axis_has_at_least_one_device(axis, size):
    with pytest.raises(UsageError, match=rf"^--mesh.{axis} is {size}: give 1 or more"):
        MeshConfig(**{axis: size})


def test_counts():
    config = MeshConfig(replica=2, data=3, model=5)
    assert (config.num_devices, config.shards(("replica", "data"))) == (30, 6)


@pytest.mark.parametrize("name", sharding.RULES)
def test_rules_never_give_two_dims_of_a_weight_the_same_axis(name):
    with sharding.use_rules(sharding.RULES[name]):
        for weight in jax.tree.leaves(weight_tree(CONFIG)):
            partition(*weight.dims, sizes=EVERY)
            partition("batch", *weight.dims, sizes=EVERY, gathered=True)


def test_rules_are_part_of_what_a_compiled_function_is_remembered_by():
    seen = []

    @jax.jit
    def f(x):
        seen.append((sharding.current_rules().name, sharding.target_platform()))
        return x

    for name in ("fsdp", "tensor", "fsdp"):
        with sharding.use_mesh(mesh_of(), sharding.RULES[name]):
            f(jnp.ones(2))
    assert seen == [("fsdp", "cpu"), ("tensor", "cpu")]


@dataclasses.dataclass
class Device:
    slice_index: int = 0
    platform: str = "tpu"


def test_hosts_of_gpus_are_no_slices():
    """JAX gives the GPUs of each host a slice of their own."""
    devices = [Device(i // 4, "gpu") for i in range(8)]
    assert sharding.whole_mesh("fsdp", devices) == sharding.MeshConfig(data=8)


@pytest.mark.parametrize(
    ("name", "slices", "wanted"),
    [
        ("data", 1, (8, 1, 1)),
        ("fsdp", 1, (1, 8, 1)),
        ("fsdp-tensor", 1, (1, 8, 1)),
        ("tensor", 1, (1, 1, 8)),
        ("replica-fsdp", 1, (1, 8, 1)),
        ("replica-fsdp", 2, (2, 4, 1)),
        ("fsdp-tensor", 2, (2, 4, 1)),
        ("fsdp", 4, (4, 2, 1)),
        ("data", 2, (8, 1, 1)),
        ("tensor", 2, (2, 1, 4)),
    ],
)
def test_the_mesh_of_all_devices(name, slices, wanted):
    devices = [Device(i % slices) for i in range(8)]
    found = sharding.whole_mesh(name, devices)
    assert (found.replica, found.data, found.model) == wanted
    assert sharding.mesh_of_all(name, 8, slices) == found


def test_axes_that_are_left_out_split_nothing():
    with sharding.use_mesh(mesh_of(2, 2, 2), sharding.RULES["replica-fsdp"]):
        assert sharding.copy_axes() == ("replica",)
        assert sharding.shards_of("batch") == 8
        with sharding.leave_out(("replica",)):
            assert spec("batch", None) == P(("data", "model"), None)
            assert sharding.shards_of("batch") == 4
    with sharding.use_mesh(mesh_of(2, 2, 2), sharding.RULES["data"]):
        assert sharding.copy_axes() == ("replica", "data", "model")
