"""What single instructions of a compiled program cost: FLOPs of products, bytes of memory, trips.

Two FLOPs a multiplication with addition. Only products are counted: what else is computed goes by
the memory that it touches.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from meshlm.planning.hlo_text import Array, Computation, Instruction, Text

_KNOWN_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_LIBRARY_PRODUCT = re.compile(r'custom_call_target="__(?:cublas|onednn|triton)\$')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')

# Nothing is read or written for these: names for what is there already, or the ends of copies.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|iota|"
    r"partition-id|replica-id|opt-barrier|domain|add-dependency|get-dimension-size|"
    r"call-start|async-start|[\w-]+-(update|done)"
)
_FREE_CALLS = re.compile(
    r'custom_call_target="(?:AllocateBuffer|ConcatBitcast|Sharding|AsyncCollective\w+|'
    r'AssumeGatherIndicesInBound|MoveToHost|MoveToDevice)"'
)


def operands_of(instruction: Instruction, computation: Computation) -> list[tuple[Array, ...]]:
    """Returns the arrays of each operand."""
    return [computation.instructions[name].results for name in instruction.operands]


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a dot, a convolution or a library's product; 0 for all else.

    Also for kernels written by hand (splash attention): their text is code of their own.
    """
    if instruction.op == "dot":
        lhs = operands_of(instruction, computation)[0][0]
        contracted = instruction.numbers("lhs_contracting_dims")
        return _dot_flops(instruction.results[0], lhs, contracted)
    if instruction.op == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.op == "custom-call" and _LIBRARY_PRODUCT.search(instruction.attributes):
        match = _CONTRACTED.search(instruction.attributes)
        lhs = operands_of(instruction, computation)[0][0]
        contracted = [int(n) for n in re.findall(r"\d+", match.group(1))] if match else [1]
        return _dot_flops(instruction.results[0], lhs, contracted)
    return 0.0


def _dot_flops(result: Array, lhs: Array, contracted: Sequence[int]) -> float:
    return 2.0 * math.prod(result.dims) * math.prod(lhs.dims[d] for d in contracted)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a convolution, places in the padding left out.

    TPUs write products as convolutions whose window is mostly padding.
    """
    lhs, rhs = (arrays[0] for arrays in operands_of(instruction, computation)[:2])
    result = instruction.results[0]
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None, instruction
    lhs_labels, rhs_labels, result_labels = labels.groups()
    window = _window(instruction, sum(label.isdigit() for label in lhs_labels))
    places = 1
    for d, (stride, low, dilate, rhs_dilate) in enumerate(window):
        size = lhs.dims[lhs_labels.index(str(d))]
        taps = rhs.dims[rhs_labels.index(str(d))]
        outputs = result.dims[result_labels.index(str(d))]
        places *= sum(
            _is_inside(output * stride + tap * rhs_dilate - low, size, dilate)
            for output in range(outputs)
            for tap in range(taps)
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = lhs.dims[lhs_labels.index("b")] // (int(groups.group(1)) if groups else 1)
    features = rhs.dims[rhs_labels.index("i")] * result.dims[result_labels.index("f")]
    return 2.0 * places * batch * features


def _is_inside(place: int, size: int, dilate: int) -> bool:
    return 0 <= place <= (size - 1) * dilate and place % dilate == 0


def _window(instruction: Instruction, dims: int) -> list[tuple[int, int, int, int]]:
    """Returns (stride, padding before, dilation of the left, of the right) of each dim."""
    match = _WINDOW.search(instruction.attributes)
    fields = dict(field.split("=") for field in match.group(1).split()) if match else {}

    def values(name: str, default: str) -> list[int]:
        texts = fields[name].split("x") if name in fields else [default] * dims
        return [int(text.split("_")[0]) for text in texts]

    return list(
        zip(
            values("stride", "1"),
            values("pad", "0_0"),
            values("lhs_dilate", "1"),
            values("rhs_dilate", "1"),
            strict=True,
        )
    )


def trips_of(loop: Instruction, computation: Computation, text: Text) -> int:
    """Returns how often a loop's body runs.

    Raises:
        ValueError: the loop does not count up to a constant.
    """
    if match := _KNOWN_TRIPS.search(loop.attributes):
        return int(match.group(1))
    condition, body = (text.computations[loop.called(name) or ""] for name in ("condition", "body"))
    compared = _scalar(condition.root, "compare", text)
    if compared is None or "direction=LT" not in compared.attributes:
        raise ValueError(f"a loop whose end cannot be read: {condition.root}")
    start = computation.instructions[loop.operands[0]]
    element, end = (_element_or_value(name, condition) for name in compared.operands)
    if element[0] != "element":
        raise ValueError(f"a loop that counts nothing up: {compared}")
    limit = end[1] if end[0] == "value" else _started_with(start, end[1], computation)
    first = _started_with(start, element[1], computation)
    return max(0, -(-(limit - first) // _step(body, element[1], text)))


def _scalar(instruction: Instruction, op: str, text: Text) -> Instruction | None:
    """Returns an instruction of this operation, taken out of the fusion that wraps it alone."""
    if instruction.op == op:
        return instruction
    if instruction.op != "fusion":
        return None
    called = text.computations[instruction.called("calls") or ""]
    inside = [called.instructions[name] for name in called.root.operands]
    if called.root.op != op or any(operand.op != "parameter" for operand in inside):
        return None
    names = tuple(instruction.operands[int(operand.literal)] for operand in inside)
    return dataclasses.replace(called.root, operands=names)


def _element_or_value(name: str, condition: Computation) -> tuple[str, int]:
    """Returns ("value", n) for a constant, or ("element", i) for an element of the loop's state."""
    instruction = condition.instructions[name]
    if instruction.op in ("copy", "bitcast"):
        return _element_or_value(instruction.operands[0], condition)
    if instruction.op == "constant":
        return "value", int(instruction.literal)
    if instruction.op == "get-tuple-element":
        return "element", _index(instruction)
    raise ValueError(f"a loop whose end cannot be read: {instruction}")


def _index(element: Instruction) -> int:
    match = re.search(r"index=(\d+)", element.attributes)
    assert match is not None, element
    return int(match.group(1))


def _started_with(start: Instruction, element: int, computation: Computation) -> int:
    """Returns the constant with which an element of a loop's state begins."""
    found = computation.instructions[start.operands[element]]
    while found.op in ("copy", "bitcast"):
        found = computation.instructions[found.operands[0]]
    if found.op != "constant":
        raise ValueError(f"a loop that does not begin at a constant: {found}")
    return int(found.literal)


def _step(body: Computation, element: int, text: Text) -> int:
    """Returns what an element of a loop's state grows by."""
    grown = body.instructions[body.root.operands[element]]
    while grown.op in ("copy", "bitcast"):
        grown = body.instructions[grown.operands[0]]
    added = _scalar(grown, "add", text)
    for name in () if added is None else added.operands:
        if body.instructions[name].op == "constant":
            return int(body.instructions[name].literal)
    raise ValueError(f"a loop whose step cannot be read: {grown}")


def memory_bytes(instruction: Instruction, computation: Computation, text: Text) -> float:
    """Returns the bytes that one execution reads from and writes to the device's main memory.

    What is fused into one loop or lies on the chip costs nothing; of an array that is only sliced,
    the slice counts, and of one that is updated in place, the update.
    """
    op = instruction.op
    if _FREE.fullmatch(op) or (op == "custom-call" and _FREE_CALLS.search(instruction.attributes)):
        return 0.0
    operands = operands_of(instruction, computation)
    if op == "fusion":
        called = text.computations[instruction.called("calls") or ""]
        read = sum(
            min(_read_bytes(called, index, text), sum(a.bytes for a in arrays)) * _in_main(arrays)
            for index, arrays in enumerate(operands)
        )
        written = sum(
            size for size, array in _writes(called.root, called, text) if array.space == 0
        )
        return read + written
    if op in ("dynamic-slice", "slice", "gather"):
        operands = [instruction.results]
    elif op == "dynamic-update-slice":
        return 2.0 * sum(a.bytes for a in operands[1])
    elif op in ("copy-start", "slice-start", "dynamic-slice-start"):
        # Copies that go on beside other work: (target, source, ...) or (source, target, ...).
        source, target = operands[0][0], instruction.results[op != "copy-start"]
        return float(target.bytes * ((source.space == 0) + (target.space == 0)))
    elif op in ("all-gather-start", "collective-permute-start"):
        operands = []  # the results hold them
    elif op == "send":
        return float(operands[0][0].bytes * _in_main(operands[0]))  # its result is its operand
    arrays = [array for group in [*operands, instruction.results] for array in group]
    return float(sum(array.bytes for array in arrays if array.space == 0))


def _in_main(arrays: Sequence[Array]) -> bool:
    return all(array.space == 0 for array in arrays)


def _read_bytes(computation: Computation, parameter: int, text: Text) -> int:
    """Returns the bytes of a parameter that a fused computation reads."""
    return _used_bytes(computation.parameters[parameter], computation, text)


def _used_bytes(value: Instruction, computation: Computation, text: Text) -> int:
    whole = sum(array.bytes for array in value.results)
    used = 0
    for user, index in computation.uses.get(value.name, ()):
        if user.op in ("dynamic-slice", "slice", "gather") and index == 0:
            used += sum(array.bytes for array in user.results)
        elif user.op in ("bitcast", "copy", "convert") and user is not computation.root:
            used += _used_bytes(user, computation, text)
        elif user.op in ("dynamic-update-slice", "scatter") and index == 0:
            pass  # it takes the memory of its operand
        elif user.op == "tuple" or (user.op == "bitcast" and user is computation.root):
            pass  # passed on as it is
        elif user.op == "fusion":
            used += _read_bytes(text.computations[user.called("calls") or ""], index, text)
        elif user.op.startswith("all-") and is_going_on(computation):
            pass  # read when the exchange began
        else:
            return whole
    return min(used, whole)


def _writes(
    value: Instruction, computation: Computation, text: Text
) -> Iterator[tuple[int, Array]]:
    """Yields (bytes written, array) for each result of a fused computation."""
    whole = [(array.bytes, array) for array in value.results]
    inside = computation.instructions
    if value.op == "tuple":
        for name in value.operands:
            yield from _writes(inside[name], computation, text)
    elif value.op == "parameter" or (value.op.startswith("all-") and is_going_on(computation)):
        yield from ((0, array) for _, array in whole)
    elif value.op in ("dynamic-update-slice", "scatter"):
        update = inside[value.operands[1 if value.op == "dynamic-update-slice" else 2]]
        yield sum(array.bytes for array in update.results), value.results[0]
    elif value.op == "bitcast":
        for size, _ in _writes(inside[value.operands[0]], computation, text):
            yield min(size, whole[0][0]), value.results[0]
    elif value.op == "fusion":
        called = text.computations[value.called("calls") or ""]
        sizes = [size for size, _ in _writes(called.root, called, text)]
        yield from zip(sizes, value.results, strict=True)
    else:
        yield from whole


def is_going_on(computation: Computation) -> bool:
    """True where an exchange in a fused computation has begun in another one.

    A TPU runs an exchange beside products: a first fusion begins it, those of the products carry
    it on, a last one waits for it. Each of them names it, under the same channel.
    """
    return computation.name.startswith("async_collective_fusion") or any(
        'custom_call_target="AsyncCollectiveDone"' in i.attributes for i in computation
    )
