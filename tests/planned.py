"""Setups of training steps for tests of planning."""

from __future__ import annotations

import dataclasses

from meshlm.core.sharding import MeshConfig
from meshlm.model.config import ModelConfig
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import Compute
from meshlm.planning.setup import Setup
from meshlm.planning.topology import Interconnect, Topology
from meshlm.step import StepConfig
from tiny import OPTIMIZER

GPTJ = PRESETS["gpt-j-6b"]


def setup_of(
    shape: ModelConfig = GPTJ,
    *,
    sharding="fsdp-tensor",
    remat="full",
    accumulate: int = 1,
    batch_size: int = 512,
    seq_len: int = 2048,
    optimizer: str = "adamw",
    dtype="bfloat16",
    attention="plain",
    **mesh: int,
) -> Setup:
    """A setup; what is left of the keywords are sizes of mesh axes."""
    return Setup(
        step=StepConfig(
            model=shape,
            optimizer=dataclasses.replace(OPTIMIZER, name=optimizer),
            compute=Compute(remat=remat, dtype=dtype, attention=attention),
            accumulate=accumulate,
        ),
        mesh=MeshConfig(**mesh),
        sharding=sharding,
        batch_size=batch_size,
        seq_len=seq_len,
    )


def with_links(topology: Topology, link_bytes_per_s: float | None) -> Topology:
    links = dataclasses.replace(topology.interconnect, link_bytes_per_s=link_bytes_per_s)
    assert isinstance(links, Interconnect)
    return dataclasses.replace(topology, interconnect=links)
