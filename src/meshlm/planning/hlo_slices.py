"""Exchanges between slices of TPUs in a compiled program: sends to the hosts, and what comes back.

The compiler for several slices cuts an exchange into one within each slice, over its links, and one
of each device with its counterparts in the others, which the hosts' network carries.
"""

import itertools
import re
from collections.abc import Iterator

from meshlm.planning.hlo_text import Computation, Instruction

# Where there are several slices, the devices of the first are numbered from here on, and so forth.
NUMBERS_OF_A_SLICE = 100_000
_KIND = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
# Whole slices as "{1,2}x{0:15}", or devices: {{100000,200000},...}, {{100000->200000},...}
_TARGET = re.compile(r'_xla_megascale_target=(?:"\{([0-9,:]+)\}x|\{\{([0-9,>-]+)\})')
_NAME = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')


def is_between_slices(instruction: Instruction) -> bool:
    """True for an instruction that begins an exchange between slices."""
    return instruction.op == "send" and _KIND.search(instruction.attributes) is not None


def exchange_of(send: Instruction) -> tuple[str, int]:
    """Returns (the kind of exchange, as all-reduce; the slices that take part).

    Raises:
        ValueError: the text does not name them in a way that is known here.
    """
    kind, target = _KIND.search(send.attributes), _TARGET.search(send.attributes)
    if kind is None or target is None:
        raise ValueError(f"an exchange between slices that cannot be read: {send.attributes[:300]}")
    slices, devices = target.groups()
    if slices is not None:
        count = sum(map(_count, slices.split(",")))
    else:
        count = len({int(n) // NUMBERS_OF_A_SLICE for n in re.findall("[0-9]+", devices)})
    op = kind.group(1).lower().replace("_", "-")
    return {"one-to-one": "collective-permute"}.get(op, op), count


def _count(part: str) -> int:
    """Returns how many numbers are in 3 or 0:7."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def waited_for(send: Instruction, computation: Computation) -> Iterator[Instruction]:
    """Yields what the program does between the beginning of an exchange and the wait for its end.

    Instructions of a compiled program stand in the order in which they run.
    """
    name = _NAME.search(send.attributes)
    later = itertools.dropwhile(lambda i: i.name != send.name, computation)
    back = ""
    for instruction in later:
        if instruction.op == "recv" and name is not None and name.group() in instruction.attributes:
            back = instruction.name
        if instruction.op == "recv-done" and back in instruction.operands:
            return
        yield instruction
