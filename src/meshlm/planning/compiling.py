"""What the compiler says of a training step: its memory, FLOPs, traffic and collectives."""

import dataclasses
from typing import Literal

from meshlm.planning.setup import Setup
from meshlm.planning.topology import Topology

Where = Literal["forward", "backward", "update", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between devices in the compiled step."""

    op: str
    """all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute."""
    axes: tuple[str, ...]
    """The mesh axes it runs over, from its groups of devices; empty where they are no axes."""
    dtype: str
    """As XLA writes it: f32, bf16, s32. Of the largest array, where several travel together."""
    bytes: int
    """The whole array on one device in one execution: what an all-gather gives, what an all-reduce
    gives and what a reduce-scatter takes."""
    count: int
    """Executions in a step, loops multiplied by their trips."""
    group_size: int
    """Devices that take part together."""
    where: Where
    """The part of the step, where the compiler's metadata tells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiled step on one device. Bytes and FLOPs are of one device and one step."""

    fits: bool
    message: str = ""
    """The compiler's own words where it refused."""
    argument_bytes: int = 0
    """State and batch. All figures are 0 where the compiler refused."""
    output_bytes: int = 0
    alias_bytes: int = 0
    """Outputs that take the memory of arguments: the new state that of the old."""
    temp_bytes: int = 0
    """The rest: gradients, activations, gathered weights."""
    peak_bytes: int = 0
    """The most that is there at once: arguments, outputs that are not arguments, temporaries."""
    available_bytes: int | None = None
    """What the compiler lets a program use of a device's memory, where it says so."""
    flops: float = 0.0
    """Of the matrix products, loops multiplied by their trips."""
    bytes_accessed: float = 0.0
    """Read from and written to the device's memory, loops multiplied by their trips."""
    collectives: tuple[Collective, ...] = ()
    lower_s: float = 0.0
    compile_s: float = 0.0
    jax_version: str = ""
    libtpu_version: str = ""


def compile_setup(setup: Setup, topology: Topology, *, timeout_s: float = 900) -> Compiled:
    """Returns what the compiler says of the very training step on this topology.

    Raises:
        UsageError: setup and topology do not fit, or nothing here compiles for the topology.
        MeshLMError: the compiler failed, or took longer than `timeout_s`.
    """
    raise NotImplementedError(setup, topology, timeout_s)
