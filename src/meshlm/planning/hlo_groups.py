"""Who exchanges with whom in a compiled program: groups of devices as axes of the mesh.

Device numbers in the text are places in the mesh, row by row.
"""

import math
import re
from collections.abc import Mapping, Sequence

from meshlm.planning.hlo_text import Instruction

_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))?\s*\{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ALL = re.compile(r"replica_groups=\{\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{([\d,{}]*)\}\}")
_SIZE = re.compile(r"'([^']+)'=(\d+)")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def group_of(instruction: Instruction, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns (the mesh axes that an exchange runs over, the devices that take part together).

    Where the devices are fewer than the axes have together, the exchange runs over a part of them.

    Raises:
        ValueError: the text names its groups in a way that is not known here.
    """
    group = _first_group(instruction.attributes, math.prod(sizes.values()))
    if group is None:
        raise ValueError(f"groups of devices that cannot be read: {instruction.attributes[:300]}")
    places = [_place(device, sizes) for device in group]
    axes = tuple(axis for axis, *column in zip(sizes, *places, strict=True) if len(set(column)) > 1)
    if instruction.op.startswith("collective-permute"):
        return axes, math.prod(sizes[axis] for axis in axes)
    return axes, len(group)


def _first_group(text: str, devices: int) -> Sequence[int] | None:
    """Returns the devices of the first group; of a permutation, all that it moves between."""
    if match := _PAIRS.search(text):
        pairs = [_numbers(pair) for pair in match.group(1).split("},{")]
        chain = [pairs[0][0]]
        following = {pair[0]: pair[1] for pair in pairs}
        while following.get(chain[-1], chain[0]) not in chain:
            chain.append(following[chain[-1]])
        return chain
    if match := _LISTED.search(text):
        return _numbers(match.group(1))
    if match := _COUNTED.search(text):
        _, size, dims, order = match.groups()
        return _laid_out(dims, order)[: int(size)]
    if match := _NAMED.search(text):
        mesh, order, axes = match.groups()
        group = _named_group(mesh, axes)
        if order is None:
            return group
        numbers = _ORDER.fullmatch(order)
        ids = _laid_out(*numbers.groups()) if numbers else _numbers(order)
        return [ids[place] for place in group]
    return range(devices) if _ALL.search(text) else None


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _laid_out(dims: str, order: str | None) -> list[int]:
    """Returns 0, 1, 2, ... laid out as `dims`, these put in `order`, and read row by row."""
    shape = _numbers(dims)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    found = [0]
    for d in _numbers(order) if order else range(len(shape)):
        found = [base + step * strides[d] for base in found for step in range(shape[d])]
    return found


def _named_group(mesh: str, axes: str) -> list[int]:
    """Returns the places of the first group of a form as mesh['a'=32,'b'=8] {'b'} or {'a':(2)4}."""
    sizes = {name: int(size) for name, size in _SIZE.findall(mesh)}
    names = list(sizes)
    found = [0]
    for name, before, part in _AXIS.findall(axes):
        stride = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        count = int(part) if part else sizes[name]
        if part:  # the axis is cut into (before, part, rest)
            stride *= sizes[name] // (int(before) * count)
        found = [base + step * stride for base in found for step in range(count)]
    return found


def _place(device: int, sizes: Mapping[str, int]) -> list[int]:
    """Returns where a device stands along each axis of the mesh."""
    found = []
    for size in reversed(list(sizes.values())):
        found.append(device % size)
        device //= size
    return found[::-1]
