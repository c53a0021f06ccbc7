"""The text of a compiled XLA program, taken apart into computations and instructions.

Only what costs are counted from is read: names, operations, operands, shapes, memory spaces, and
the attributes as they are written.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_END = re.compile(r"\}(, execution_thread=.*)?")
_COMMENT = re.compile(r"/\*.*?\*/")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array that an instruction gives."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    """0 is the device's main memory; others are on the chip, or the host's."""

    @property
    def bytes(self) -> int:
        """Bytes of its elements, without padding."""
        return math.prod(self.dims) * _bits(self.dtype) // 8


@functools.cache
def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = _BITS.match(dtype)  # bf16, f8e4m3fn, s32; token and opaque have none
    return int(match.group(1)) if match else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    """What stands in the operands' place, for constants and parameters."""
    attributes: str

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return match.group(1) if match else None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Returns the whole numbers of an attribute such as `dimensions={0,2}`."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in match.group(1).split(",") if n) if match else ()

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from; empty where the compiler does not tell."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions; the last one is not always its result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their numbers."""
        return {int(i.literal): i for i in self if i.op == "parameter"}

    @functools.cached_property
    def uses(self) -> dict[str, list[tuple[Instruction, int]]]:
        """By name: the instructions that take it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self:
            for index, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, index))
        return found

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Text:
    """A whole program."""

    computations: dict[str, Computation]
    entry: Computation


def parse_text(text: str) -> Text:
    """Returns the program of an HLO text.

    Raises:
        ValueError: this is no such text.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            if match := _HEADER.match(line):
                name, lines = match.group(2), []
                entry = name if match.group(1) else entry
        elif _END.fullmatch(line):
            computations[name] = _parse_computation(name, lines)
            name = None
        elif _LINE.match(line):
            lines.append(line)
        elif lines:  # what kernels say of themselves has line ends
            lines[-1] += line
    if entry is None or entry not in computations:
        raise ValueError("this is no text of a compiled program: it has no ENTRY that ends")
    return Text(computations, computations[entry])


def _parse_computation(name: str, lines: list[str]) -> Computation:
    instructions: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in lines:
        match = _LINE.match(line)
        assert match is not None
        instruction = _parse_instruction(match.group(2), match.group(3))
        instructions[instruction.name] = instruction
        root = instruction if match.group(1) else root
    if root is None:
        raise ValueError(f"computation {name} has no result")
    return Computation(name, instructions, root)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Returns an instruction from what stands behind its `=`."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ") - 1
    opening = text.index("(", end + 1)
    closing = _closing(text, opening)
    inside = _COMMENT.sub("", text[opening + 1 : closing])
    return Instruction(
        name=name,
        op=text[end + 1 : opening].strip(),
        results=tuple(_arrays(text[: end + 1])),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=text[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    """Returns where the parenthesis that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is open at the end of: {text[:200]}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        yield Array(
            dtype,
            tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim),
            int(space.group(1)) if space else 0,
        )
