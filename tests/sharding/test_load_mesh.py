"""Weights of any format onto a mesh: the recorded logits of the original come out there too."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import meshlm
from meshlm.core.errors import UsageError
from meshlm.core.sharding import MeshConfig
from tiny import relative_max

FOLDER = Path(__file__).parent.parent / "fixtures" / "mtj" / "dev_s8_bf16"


@pytest.mark.parametrize(
    "mesh", [MeshConfig(model=8), MeshConfig(data=2, model=4)], ids=["model8", "data2-model4"]
)
def test_recorded_logits_on_a_mesh(mesh):
    golden = np.load(FOLDER / "golden.npz")
    model = meshlm.load(FOLDER / "slim", dtype="float32", mesh=mesh)
    query = model.params.blocks[0].attention.query.weight
    assert len(query.sharding.device_set) == 8
    assert query.addressable_shards[0].data.size == query.size // 8
    found = model.logits(golden["tokens"][None].astype(np.int32))[0]
    assert relative_max(found, golden["logits"]) <= 2e-5
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}


def test_a_mesh_that_does_not_divide_is_refused():
    folder = FOLDER.parent / "dev_s4_distinct" / "slim"
    with pytest.raises(UsageError, match="devices cannot share evenly"):
        meshlm.load(folder, mesh=MeshConfig(model=8))
