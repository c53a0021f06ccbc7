"""The reader of compiled programs, against XLA's own counts and counts by hand."""

from __future__ import annotations

import functools
import math
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meshlm.planning.hlo import read_program
from meshlm.planning.hlo_groups import group_of
from meshlm.planning.hlo_text import Instruction, parse_text

SIZES = {"replica": 2, "data": 2, "model": 2}


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def read(function, *arguments):
    return read_program(compiled(function, *arguments).as_text(), {"data": 1})


def xla_counts(program) -> tuple[float, float]:
    counts = program.cost_analysis()
    return counts["flops"], counts["bytes accessed"]


# Programs without loops, in which products are all the arithmetic: XLA counts them itself.

PRODUCTS = {
    "matrix": (lambda x, w: x @ w, array(64, 32), array(32, 48)),
    "batched": (
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w),
        array(4, 64, 32),
        array(4, 32, 48),
    ),
    "two contracted": (
        lambda x, w: jnp.einsum("btnh,nhd->btd", x, w),
        array(2, 16, 4, 8),
        array(4, 8, 40),
    ),
}
CONVOLUTIONS = {
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 1), "padding": ((1, 1), (2, 0))},
    "dilated left": {
        "window_strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (2, 3),
    },
    "mostly padding": {"window_strides": (1, 1), "padding": ((8, 8), (9, 9))},
    "dilated right": {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (2, 1)},
    "groups": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_without_loops_are_what_xla_counts(name):
    program = compiled(*PRODUCTS[name])
    found = read_program(program.as_text(), {"data": 1})
    assert (found.flops, found.bytes_accessed) == xla_counts(program)
    assert found.collectives == ()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_what_xla_counts(name):
    """TPUs write products as convolutions with paddings and dilations."""
    options = CONVOLUTIONS[name]
    channels = 4 // options.get("feature_group_count", 1)
    program = compiled(
        lambda x, w: jax.lax.conv_general_dilated(x, w, **options),
        array(3, 4, 9, 10),
        array(6, channels, 3, 2),
    )
    assert " convolution(" in program.as_text()
    found = read_program(program.as_text(), {"data": 1})
    assert (found.flops, found.bytes_accessed) == xla_counts(program)


# Loops: XLA counts a body once.

N = 32
PRODUCT = 2 * N**3


def chain(x, weights):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]


def nest(x, weights):
    def outer(c, _):
        return chain(c, weights), None

    return jax.lax.scan(outer, x, None, length=5)[0]


def count_up(first: int, last: int, step: int):
    def function(x):
        def body(state):
            i, c = state
            return i + step, jnp.tanh(c @ c)

        return jax.lax.while_loop(lambda state: state[0] < last, body, (first, x))[1]

    return function


@pytest.mark.parametrize(
    ("function", "arguments", "products"),
    [
        (chain, (array(N, N), array(7, N, N)), 7),
        (nest, (array(N, N), array(7, N, N)), 35),
        (count_up(0, 10, 1), (array(N, N),), 10),
        (count_up(3, 10, 2), (array(N, N),), 4),
        (jax.grad(lambda x, w: jnp.sum(chain(x, w)), argnums=1), None, 21),
    ],
    ids=["chain", "nest", "whole", "steps of two", "gradient"],
)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "by its condition"])
def test_a_body_counts_as_often_as_it_runs(function, arguments, products, stated):
    text = compiled(function, *(arguments or (array(N, N), array(7, N, N)))).as_text()
    if not stated:  # as programs for TPUs are
        text, gone = re.subn("known_trip_count", "unknown", text)
        assert gone
    assert read_program(text, {"data": 1}).flops == products * PRODUCT


def test_a_loop_without_a_known_end_is_refused():
    def until_small(x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) > 1.0, lambda c: c @ c / 2, x)

    with pytest.raises(ValueError, match="loop"):
        read(until_small, array(N, N))


def test_a_branch_counts_once():
    def either(which, x):
        return jax.lax.cond(which, lambda c: c @ c @ c, lambda c: c @ c, x)

    assert read(either, array(dtype="bool"), array(N, N)).flops == 2 * PRODUCT


def test_of_stacked_weights_a_trip_reads_one_layer():
    """A slice of an argument of a loop's body is read, not the argument."""
    layers = 50
    found = read(chain, array(N, N), array(layers, N, N))
    stack = layers * N * N * 4
    assert stack < found.bytes_accessed < 12 * stack  # and not layers x stack


def test_an_update_in_place_writes_what_is_new():
    def fill(buffer):
        def body(c, i):
            row = jnp.full((1, N), i, jnp.float32)
            return jax.lax.dynamic_update_slice(c, row, (i, 0)), None

        return jax.lax.scan(body, buffer, jnp.arange(500))[0]

    found = read(fill, array(500, N))
    assert found.bytes_accessed < 10 * 500 * N * 4


# Exchanges, on eight virtual devices.


@functools.cache
def mesh():
    return jax.make_mesh(
        tuple(SIZES.values()), tuple(SIZES), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


def over(axes, function, *arguments, out=None):
    spec = PartitionSpec(tuple(SIZES))
    mapped = jax.shard_map(
        function, mesh=mesh(), in_specs=spec, out_specs=out or spec, check_vma=False
    )
    return read_program(compiled(mapped, *arguments).as_text(), SIZES)


@pytest.mark.parametrize(
    "axes", [("model",), ("data",), ("replica",), ("replica", "data"), tuple(SIZES)], ids=str
)
def test_exchanges_are_named_by_axis_and_size(axes):
    devices = math.prod(SIZES[axis] for axis in axes)
    x = array(8 * 6, 16)
    (total,) = over(axes, lambda c: jax.lax.psum(c, axes), x).collectives
    assert (total.op, total.axes, total.group_size) == ("all-reduce", axes, devices)
    assert (total.bytes, total.count, total.dtype) == (6 * 16 * 4, 1, "f32")
    assert total.wire_bytes == 2 * 6 * 16 * 4 * (devices - 1) / devices
    (gathered,) = over(axes, lambda c: jax.lax.all_gather(c, axes, tiled=True)[:6], x).collectives
    assert (gathered.op, gathered.axes) == ("all-gather", axes)
    assert gathered.bytes == devices * 6 * 16 * 4
    assert gathered.wire_bytes == (devices - 1) * 6 * 16 * 4


def test_a_shift_along_an_axis():
    ring = [(0, 1), (1, 0)]
    (shift,) = over("data", lambda c: jax.lax.ppermute(c, "data", ring), array(16, 8)).collectives
    assert (shift.op, shift.axes, shift.group_size) == ("collective-permute", ("data",), 2)
    assert shift.wire_bytes == shift.bytes == 2 * 8 * 4


def test_exchanges_in_loops_count_by_trips_and_by_part():
    def loss(x):
        def body(c, _):
            return jax.lax.psum(jnp.tanh(c), "model"), None

        return jnp.sum(jax.lax.scan(body, x, None, length=9)[0])

    found = over("model", jax.grad(loss), array(16, 8)).collectives
    by_part = {c.where: c.count for c in found}
    assert by_part == {"forward": 9, "backward": 9}


# Groups, as programs for TPUs write them.


def group(attributes: str, sizes=None, op: str = "all-reduce"):
    return group_of(Instruction("x", op, (), (), "", attributes), sizes or SIZES)


PLACES = np.arange(8).reshape(2, 2, 2)


def listed(*order: int, axes: int) -> str:
    """Groups written out: `axes` last dims of the mesh in that order belong together."""
    groups = PLACES.transpose(order).reshape(-1, 2**axes)
    return "replica_groups={{" + "},{".join(",".join(map(str, g)) for g in groups) + "}}"


@pytest.mark.parametrize(
    ("text", "axes", "devices"),
    [
        (listed(0, 1, 2, axes=1), ("model",), 2),
        (listed(0, 2, 1, axes=1), ("data",), 2),
        (listed(2, 1, 0, axes=2), ("replica", "data"), 4),
        ("replica_groups={}, to_apply=%add", ("replica", "data", "model"), 8),
        ("replica_groups=[4,2]<=[8]", ("model",), 2),
        ("replica_groups=[2,4]<=[8]", ("data", "model"), 4),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", ("data",), 2),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("replica",), 2),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ("replica", "model"), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("replica",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", ("data", "model"), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("data",), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ("model",), 2),
        ("replica_groups=mesh['a'=1,'b'=8] {'a','b'}", ("replica", "data", "model"), 8),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("replica",), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", ("model",), 2),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(text, axes, devices):
    assert group(text) == (axes, devices)


def test_a_part_of_an_axis_has_fewer_devices_than_the_axis():
    assert group("replica_groups=[4,2]<=[8]", {"data": 8}) == (("data",), 2)


def test_a_permutation_goes_along_its_axis():
    ring = [*range(0, 32, 4), 0]
    pairs = "},{".join(f"{a},{b}" for a, b in pairwise(ring))
    sizes = {"replica": 1, "data": 8, "model": 4}
    text = "source_target_pairs={{" + pairs + "}}"
    assert group(text, sizes, "collective-permute") == (("data",), 8)


def test_groups_in_another_form_are_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        group("replica_groups=somehow")


# Texts as the compiler for TPUs writes them, shortened.

REDUCE_SCATTER = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[32,128] {
  %input = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,128]{1,0:T(8,128)} all-reduce(%input), channel_id=7, \
replica_groups=[4,2]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add
  %place = u32[]{:T(128)} partition-id()
  %zero = u32[]{:T(128)} constant(0)
  ROOT %part = f32[32,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %place, %zero), \
dynamic_slice_sizes={32,128}
}

ENTRY %main (x: f32[64,128]) -> f32[32,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  ROOT %fusion.3 = f32[32,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
}
"""


def test_a_fusion_of_all_reduce_and_slice_is_a_reduce_scatter():
    (found,) = read_program(REDUCE_SCATTER, SIZES).collectives
    assert (found.op, found.axes, found.where) == ("reduce-scatter", ("data",), "backward")
    assert found.bytes == 64 * 128 * 4
    assert found.wire_bytes == 32 * 128 * 4
    assert not found.overlapped


# A gather that is begun, carried on beside a product, and waited for; S(1) is memory on the chip.
OVERLAPPED = """
HloModule step, is_scheduled=true

%start (p: bf16[16,64]) -> (bf16[16,64], bf16[32,64]) {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, \
replica_groups=[4,2]<=[8], dimensions={0}, metadata={op_name="jit(step)/jvp()/convert"}
  ROOT %begun = (bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}) \
custom-call(%p, %all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (x: f32[8,64], w: f32[64,64], p: bf16[16,64]) -> \
(f32[8,64], bf16[32,64]) {
  %x = f32[8,64]{1,0:T(8,128)} parameter(0)
  %w = f32[64,64]{1,0:T(8,128)S(1)} parameter(1)
  %p.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(2)
  %product = f32[8,64]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  %all-gather.2 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=5, \
replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %both = (f32[8,64]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)(2,1)}) \
tuple(%product, %all-gather.2)
}

%done (p: bf16[16,64]) -> bf16[32,64] {
  %p.2 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=5, \
replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %ended = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%p.2, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[8,64], w: f32[64,64], p: bf16[16,64]) -> bf16[32,64] {
  %x.1 = f32[8,64]{1,0:T(8,128)} parameter(0)
  %w.1 = f32[64,64]{1,0:T(8,128)S(1)} parameter(1)
  %p.3 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(2)
  %fusion.1 = (bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}) \
fusion(%p.3), kind=kCustom, calls=%start
  %fusion.2 = (f32[8,64]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)(2,1)}) \
fusion(%x.1, %w.1, %p.3), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %fusion.3 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} fusion(%p.3), kind=kCustom, calls=%done
}
"""


def test_an_exchange_beside_products_counts_once():
    program = read_program(OVERLAPPED, SIZES)
    (found,) = program.collectives
    assert (found.op, found.count, found.overlapped) == ("all-gather", 1, True)
    assert (found.axes, found.where, found.bytes) == (("model",), "forward", 32 * 64 * 2)
    assert program.flops == 2 * 8 * 64 * 64


# A loop over (counter, x, end): LINES make %y, the next x. The counter goes from 4 to 28.
LOOP = """
%body (s: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %s = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %end = s32[]{:T(128)} get-tuple-element(%s), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
LINES
  ROOT %t = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %y, %end)
}

%condition (s: (s32[], f32[8,8], s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %end.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=2
  ROOT %lt = pred[]{:T(128)} compare(%i.1, %end.1), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(4)
  %trips = s32[]{:T(128)} constant(28)
  %start = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) \
tuple(%zero, %x.1, /*index=2*/%trips)
  %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]{:T(128)}) while(%start), \
condition=%condition, body=%body
  ROOT %found = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
MULTIPLY = "  %product = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf\n"


def looped(lines: str) -> str:
    return LOOP.replace("LINES\n", lines)


# Sums between slices: begun, and waited for after a product.
SEND = """\
  %send.1 = (f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %go), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"\
,_xla_host_transfer_rendezvous="all-reduce.67_0",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}, \
metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
"""
RECEIVE = """\
  %recv.1 = (f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%go), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.67_0"}
"""
WAIT = """\
  %recv-done.1 = (f32[8,8]{1,0:T(8,128)}, token[]) recv-done(%recv.1), channel_id=3
  %y = f32[8,8]{1,0:T(8,128)} get-tuple-element(%recv-done.1), index=0
"""
GO = "  %go = token[] after-all()\n"
BETWEEN_SLICES = looped(GO + SEND + RECEIVE + MULTIPLY + WAIT)


def test_exchanges_between_slices():
    program = read_program(BETWEEN_SLICES, SIZES)
    (found,) = program.collectives
    assert found.between_slices
    assert (found.op, found.axes, found.group_size) == ("all-reduce", ("replica",), 2)
    assert (found.bytes, found.count, found.dtype) == (8 * 8 * 4, 24, "f32")
    assert (found.where, found.overlapped) == ("backward", True)
    assert program.flops == 24 * 2 * 8**3
    # The hosts read what is sent, and its buffer is no copy.
    without = read_program(looped(GO + RECEIVE + MULTIPLY + WAIT), SIZES)
    assert program.bytes_accessed - without.bytes_accessed == 24 * 8 * 8 * 4


def test_an_exchange_between_slices_that_is_waited_for_at_once():
    text = looped(GO + SEND + RECEIVE + WAIT + MULTIPLY)
    (found,) = read_program(text, SIZES).collectives
    assert not found.overlapped


@pytest.mark.parametrize(
    ("kind", "target", "op", "slices", "size"),
    [
        ("ALL_REDUCE", "{1:8}x{0:15}", "all-reduce", 8, 256),
        ("ALL_GATHER", "{1,2,3}x{0:15}", "all-gather", 3, 3 * 256),
        ("REDUCE_SCATTER", "{1,3:4}x{0:15}", "reduce-scatter", 3, 256),
        ("ALL_REDUCE", None, "all-reduce", 2, 256),
        ("ALL_TO_ALL", None, "all-to-all", 2, 256),
        ("ONE_TO_ONE", "{{100000->200000},{100003->200003}}", "collective-permute", 2, 256),
    ],
)
def test_kinds_of_exchanges_between_slices(kind, target, op, slices, size):
    groups = "{{100000,100003,200000,200003},{300000,300003,400000,400003}}"
    target = f'"{target}"' if target and "x" in target else target or groups
    text = BETWEEN_SLICES.replace("ALL_REDUCE", kind).replace('"{1,2}x{0:15}"', target)
    (found,) = read_program(text, SIZES).collectives
    assert (found.op, found.group_size, found.bytes) == (op, slices, size)


def test_an_exchange_between_slices_in_another_form_is_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        read_program(BETWEEN_SLICES.replace("{1,2}x{0:15}", "all of them"), SIZES)


def test_memory_on_the_chip_is_no_traffic():
    """x and its product are in main memory, the weights are not."""
    lines = OVERLAPPED.replace("%w.1 = f32[64,64]{1,0:T(8,128)S(1)}", "%w.1 = f32[64,64]{1,0}")
    more = (
        read_program(lines, SIZES).bytes_accessed - read_program(OVERLAPPED, SIZES).bytes_accessed
    )
    assert more == 64 * 64 * 4


def test_a_loop_of_a_tpu_without_stated_trips():
    """The counter's end is a constant that the loop carries along."""
    text = looped(MULTIPLY.replace("%product", "%y"))
    assert read_program(text, SIZES).flops == 24 * 2 * 8**3


KERNEL = """
%there (p: f32[8,64]) -> f32[8,64] {
  ROOT %p = f32[8,64]{1,0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,64], w: f32[64,16]) -> f32[8,16] {
  %x = f32[8,64]{1,0:T(8,128)} parameter(0)
  %w = f32[64,16]{1,0:T(8,128)} parameter(1)
  %kernel = f32[8,64]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"profile":"{\\"block\\": 512}"
}}, metadata={op_name="jit(step)/kernel"}
  ROOT %y = f32[8,16]{1,0:T(8,128)} dot(%kernel, %w), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}
"""


def test_what_a_kernel_says_of_itself_may_have_line_ends():
    text = parse_text(KERNEL)
    assert list(text.entry.instructions) == ["x", "w", "kernel", "y"]
    assert text.entry.instructions["kernel"].op_name == "jit(step)/kernel"
    assert read_program(KERNEL, SIZES).flops == 2 * 8 * 64 * 16


@pytest.mark.parametrize("text", ["", "HloModule nothing", "ENTRY", KERNEL[:-3]])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="ENTRY"):
        parse_text(text)
