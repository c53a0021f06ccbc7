"""A compiled program read from its text: FLOPs, memory traffic and every exchange, by loop trips.

The compiler's own cost analysis counts the body of a loop once; here it counts as often as it runs.
This module knows no JAX: it can read the text of any program that was compiled for a mesh.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from meshlm.planning.hlo_costs import (
    is_going_on,
    memory_bytes,
    operands_of,
    product_flops,
    trips_of,
)
from meshlm.planning.hlo_groups import group_of
from meshlm.planning.hlo_slices import exchange_of, is_between_slices, waited_for
from meshlm.planning.hlo_text import Computation, Instruction, Text, parse_text

Where = Literal["forward", "backward", "update", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between devices in a compiled program."""

    op: str
    """all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute."""
    axes: tuple[str, ...]
    """The mesh axes it runs over, from its groups of devices."""
    dtype: str
    """As XLA writes it (f32, bf16, s32); of the largest array, where several travel together."""
    bytes: int
    """The whole array on one device in one execution: what an all-gather gives, an all-reduce gives
    and takes, a reduce-scatter takes."""
    count: int
    """Executions on one device, loops multiplied by their trips."""
    group_size: int
    """Devices that take part together."""
    where: Where
    """The part of the step, where the compiler tells."""
    overlapped: bool = False
    """It runs beside products: the program begins it and waits for it at two places."""
    between_slices: bool = False
    """Each device exchanges with its counterparts in other slices, over the hosts' network."""

    @property
    def wire_bytes(self) -> float:
        """The bytes that one device sends in one execution, over a ring: the least there is."""
        share = (self.group_size - 1) / self.group_size
        times = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.bytes * times.get(self.op, share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Instructions that are alike in FLOPs a byte, within a factor of two; 0 for those without."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What one execution of a program costs one device."""

    flops: float
    """Of the products."""
    bytes_accessed: float
    """Read from and written to the device's main memory."""
    traffic: tuple[Traffic, ...]
    """Both, by their relation: it tells which products wait for memory on a device."""
    collectives: tuple[Collective, ...]


_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def read_program(text: str, sizes: Mapping[str, int]) -> Program:
    """Returns the costs of a program from the text of its compiled form.

    Args:
        text: what `Compiled.as_text()` gives.
        sizes: the mesh's axes and their sizes, in the order in which they number the devices.

    Raises:
        ValueError: the text has a loop or a group of devices that cannot be read.
    """
    parsed = parse_text(text)
    totals = _Reader(parsed, sizes).totals(parsed.entry)
    collectives = sorted(totals.exchanges.items(), key=lambda item: -item[0].bytes * item[1])
    return Program(
        flops=totals.flops,
        bytes_accessed=totals.bytes_accessed,
        traffic=tuple(Traffic(flops=f, bytes=b) for f, b in totals.traffic.values()),
        collectives=tuple(dataclasses.replace(c, count=n) for c, n in collectives),
    )


@dataclasses.dataclass
class _Totals:
    flops: float = 0.0
    bytes_accessed: float = 0.0
    exchanges: Counter[Collective] = dataclasses.field(default_factory=Counter)
    traffic: dict[int | None, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """FLOPs and bytes by the binary logarithm of their relation."""

    def add(self, other: "_Totals", times: int = 1) -> None:
        self.flops += times * other.flops
        self.bytes_accessed += times * other.bytes_accessed
        for flops, size in other.traffic.values():
            self.add_traffic(times * flops, times * size)
        for exchange, count in other.exchanges.items():
            self.exchanges[exchange] += times * count

    def add_traffic(self, flops: float, size: float) -> None:
        """Adds an instruction to those that are like it."""
        if size:
            like = math.floor(math.log2(flops / size)) if flops else None
            before = self.traffic.get(like, (0.0, 0.0))
            self.traffic[like] = before[0] + flops, before[1] + size


class _Reader:
    """Adds up computations, each of them once."""

    def __init__(self, text: Text, sizes: Mapping[str, int]) -> None:
        self.text, self.sizes = text, sizes
        self.known: dict[str, _Totals] = {}

    def totals(self, computation: Computation) -> _Totals:
        """Returns the costs of one execution, those it calls included."""
        if computation.name not in self.known:
            found = _Totals()
            for instruction in computation:
                self._add(instruction, computation, found)
            self.known[computation.name] = found
        return self.known[computation.name]

    def _add(self, instruction: Instruction, computation: Computation, found: _Totals) -> None:
        flops = product_flops(instruction, computation)
        found.flops += flops
        kind = instruction.op.removesuffix("-start")
        if kind in _KINDS and not is_going_on(computation):
            found.exchanges[self._exchange(kind, instruction, computation)] += 1
        if is_between_slices(instruction):
            found.exchanges[self._between_slices(instruction, computation)] += 1
        size = memory_bytes(instruction, computation, self.text)
        found.bytes_accessed += size
        if instruction.op == "fusion":
            flops += self._called(instruction, "calls").flops
        found.add_traffic(flops, size)
        if instruction.op == "while":
            body = self.text.computations[instruction.called("body") or ""]
            found.add(self.totals(body), trips_of(instruction, computation, self.text))
        elif instruction.op == "fusion":
            inside = self._called(instruction, "calls")
            named = _with_where(inside.exchanges, _where(instruction))
            # What is inside of a fusion stays on the chip; its own ends are counted above.
            found.add(_Totals(inside.flops, 0.0, named))
        elif instruction.op in ("call", "call-start"):
            found.add(self._called(instruction, "to_apply"))
        elif instruction.op == "async-start":
            found.add(self._called(instruction, "calls"))
        elif instruction.op == "conditional":
            found.add(self._longest_branch(instruction))

    def _called(self, instruction: Instruction, attribute: str) -> _Totals:
        return self.totals(self.text.computations[instruction.called(attribute) or ""])

    def _longest_branch(self, instruction: Instruction) -> _Totals:
        names = [
            name.strip().lstrip("%")
            for name in instruction.attributes.partition("branch_computations={")[2]
            .partition("}")[0]
            .split(",")
        ]
        names += [instruction.called(f"{side}_computation") or "" for side in ("true", "false")]
        branches = [self.totals(self.text.computations[name]) for name in names if name]
        return max(branches, key=lambda totals: (totals.flops, totals.bytes_accessed))

    def _exchange(
        self, kind: str, instruction: Instruction, computation: Computation
    ) -> Collective:
        axes, group_size = group_of(instruction, self.sizes)
        arrays = [a for group in operands_of(instruction, computation) for a in group]
        given = sum(array.bytes for array in arrays)
        # TPUs write a reduce-scatter as a fusion of an all-reduce and a slice.
        scatters = computation.name.startswith("all-reduce-scatter")
        return Collective(
            op="reduce-scatter" if kind == "all-reduce" and scatters else kind,
            axes=axes,
            dtype=max(arrays, key=lambda array: array.bytes).dtype,
            bytes=given * group_size if kind == "all-gather" else given,
            count=1,
            group_size=group_size,
            where=_where(instruction),
            overlapped=instruction.op.endswith("-start") or _begins(computation),
        )

    def _between_slices(self, send: Instruction, computation: Computation) -> Collective:
        """Programs for several slices hand such an exchange to the hosts and take back its end."""
        op, slices = exchange_of(send)
        (array, *_), *_ = operands_of(send, computation)
        # The first axis takes the slices (core/placement.py).
        return Collective(
            op=op,
            axes=tuple(self.sizes)[:1],
            dtype=array.dtype,
            bytes=array.bytes * slices if op == "all-gather" else array.bytes,
            count=1,
            group_size=slices,
            where=_where(send),
            overlapped=any(map(self._has_products, waited_for(send, computation))),
            between_slices=True,
        )

    def _has_products(self, instruction: Instruction) -> bool:
        if instruction.op in ("dot", "convolution"):
            return True
        return instruction.op == "fusion" and self._called(instruction, "calls").flops > 0


def _begins(computation: Computation) -> bool:
    """True in a fused computation that begins an exchange and does not wait for its end."""
    return any('custom_call_target="AsyncCollectiveStart"' in i.attributes for i in computation)


def _with_where(exchanges: Counter[Collective], where: Where) -> Counter[Collective]:
    """Returns exchanges of a fusion, with the fusion's place where they have none of their own."""
    if where == "other":
        return exchanges
    named: Counter[Collective] = Counter()
    for exchange, count in exchanges.items():
        own = exchange.where if exchange.where != "other" else where
        named[dataclasses.replace(exchange, where=own)] += count
    return named


def _where(instruction: Instruction) -> Where:
    """Returns the part of a training step, by the marks that differentiation leaves in names."""
    name = instruction.op_name
    if "transpose(" in name:
        return "backward"
    if "jvp(" in name:
        return "forward"
    return "update" if name else "other"
