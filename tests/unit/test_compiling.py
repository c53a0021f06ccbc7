"""Steps compiled in a process of their own, for TPUs that are not here and for this machine."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from meshlm.core.errors import MeshLMError, UsageError
from meshlm.core.platform import has_tpu_compiler
from meshlm.core.sharding import RULES, MeshConfig, make_mesh, use_mesh
from meshlm.model.config import ModelConfig
from meshlm.model.flops import matmul_params
from meshlm.model.presets import PRESETS
from meshlm.model.transformer import Compute
from meshlm.planning import worker
from meshlm.planning.compiling import Compiled, compile_setup, run_worker
from meshlm.planning.setup import Setup, check_setup
from meshlm.planning.topology import find_topology
from meshlm.planning.worker import compile_for
from meshlm.step import abstract_state
from tiny import DIVISIBLE, OPTIMIZER, step_config

needs_compiler = pytest.mark.skipif(
    not has_tpu_compiler(), reason="libtpu is not installed (extra plan)"
)
# Short sequences: attention is little of the work.
MODEL = dataclasses.replace(DIVISIBLE, num_layers=3, d_model=256, head_dim=32, d_ff=512)


def setup_of(
    model: ModelConfig = MODEL,
    *,
    mesh: MeshConfig | None = None,
    compute: Compute | None = None,
    accumulate: int = 1,
    **options: Any,
) -> Setup:
    compute = compute or Compute(remat="full")
    defaults: dict[str, Any] = {"batch_size": 16, "seq_len": 16}
    return Setup(
        step=step_config(model, compute=compute, accumulate=accumulate),
        mesh=mesh or MeshConfig(),
        **defaults | options,
    )


def step_flops(setup: Setup) -> tuple[float, float]:
    """FLOPs of a step's products on one device, by hand: (least, most).

    Forward, twice that backward, and under full recomputation the forward of every layer again, but
    for what leads into the residual stream: its result is not needed. Attention may leave out the
    half that no query sees, or compute it once more; the loss may make its logits twice.
    """
    model, length = setup.step.model, setup.seq_len
    width = model.num_heads * model.head_dim
    attention = 4 * model.num_layers * length * width
    head = 2 * model.d_model * model.vocab_size
    again = 0
    if setup.step.compute.remat == "full":
        again = 2 * model.num_layers * model.d_model * (3 * width + model.d_ff)
    tokens = setup.tokens / setup.mesh.num_devices
    products = 6 * matmul_params(model) + again
    return tokens * (products + 1.5 * attention), tokens * (products + 5 * attention + head)


def state_bytes(setup: Setup) -> int:
    """Bytes of one device's part of the state, from the shardings."""
    mesh = make_mesh(setup.mesh)
    with use_mesh(mesh, RULES[setup.sharding]):
        leaves = jax.tree.leaves(abstract_state(setup.step, mesh))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def by_op(compiled: Compiled) -> dict[tuple[str, tuple[str, ...]], int]:
    found: dict[tuple[str, tuple[str, ...]], int] = {}
    for c in compiled.collectives:
        found[c.op, c.axes] = found.get((c.op, c.axes), 0) + c.bytes * c.count
    return found


# Programs of our own, for which every number is known.

OWN = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from meshlm.core.sharding import MeshConfig, make_mesh
from meshlm.planning.worker import answer_with, compile_program, target_devices

def layer(x, weights):
    up, down = weights
    hidden = jnp.tanh(jnp.einsum("bd,fd->bf", x, up, out_sharding=P("data", "model")))
    return jnp.einsum("bf,df->bd", hidden, down, out_sharding=P("data", None)), None

def layers(x, up, down):
    return jax.lax.scan(layer, x, (up, down))[0]

def product(x, y):
    return jnp.einsum("bd,fd->bf", x, y, out_sharding=P("data", None))

PROGRAMS = {
    "layers": (layers, [((1024, 512), ("data", None)), ((6, 2048, 512), (None, "model", None)),
                        ((6, 512, 2048), (None, None, "model"))]),
    "too large": (product, [((400_000, 8), ("data", None)), ((400_000, 8), (None, None))]),
}

def compile_request(request):
    config = MeshConfig(data=4, model=2)
    mesh = make_mesh(config, target_devices(request["topology"]))
    program, arguments = PROGRAMS[request["program"]]
    arrays = [
        jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, P(*spec)))
        for shape, spec in arguments
    ]
    def lower():
        with jax.set_mesh(mesh):
            return jax.jit(program).lower(*arrays)
    return compile_program(lower, config, "tpu")

answer_with(compile_request)
"""


def run_own(program: str) -> Compiled:
    request = {"program": program, "topology": "v3:2x2"}
    return run_worker(("-c", OWN), request, find_topology("v3:2x2"), 300)


@needs_compiler
def test_a_program_for_a_tpu_costs_what_it_costs_by_hand():
    """Six layers in a loop: two products each, and one sum over `model` of a device's rows."""
    found = run_own("layers")
    rows, width, hidden = 1024 // 4, 512, 2048 // 2
    assert found.flops == 6 * 2 * (2 * rows * width * hidden)
    assert by_op(found).keys() == {("all-reduce", ("model",))}
    (total,) = found.collectives
    assert (total.count, total.group_size) == (6, 2)
    assert total.bytes == rows * width * {"f32": 4, "bf16": 2}[total.dtype]
    arguments = 2 * (rows * width + 2 * 6 * width * hidden)
    assert found.argument_bytes == arguments  # these shapes fill their tiles
    assert found.output_bytes == 2 * rows * width
    assert found.peak_bytes == arguments + 2 * rows * width + found.temp_bytes
    # Each layer reads its weights once at least, and no layer reads those of the others.
    weights = 2 * 6 * 2 * width * hidden
    assert weights < found.bytes_accessed < 4 * weights
    assert found.fits
    assert found.libtpu_version


@needs_compiler
def test_a_program_that_is_too_large_is_an_answer():
    found = run_own("too large")
    assert not found.fits
    assert "RESOURCE_EXHAUSTED" in found.message
    assert "\n" not in found.message
    assert found.available_bytes is not None
    assert 15 << 30 < found.available_bytes < 16 << 30  # a core of v3 has 16 GiB
    assert (found.flops, found.peak_bytes, found.collectives) == (0, 0, ())
    assert found.compile_s > 0


# The training step.


@needs_compiler
def test_the_training_step_for_a_tpu():
    setup = setup_of(mesh=MeshConfig(data=2, model=4), accumulate=2)
    found = compile_setup(setup, find_topology("v3:2x2"))
    assert found.fits
    assert found.jax_version == jax.__version__
    least, most = step_flops(setup)
    assert least <= found.flops <= most
    # Tiles of 8 x 128 make small arrays larger, and the batch is there too.
    assert state_bytes(setup) <= found.argument_bytes <= 1.5 * state_bytes(setup)
    assert found.alias_bytes >= state_bytes(setup)
    sent = by_op(found)
    assert ("all-gather", ("data",)) in sent
    assert ("all-reduce", ("model",)) in sent
    layers = [c for c in found.collectives if c.axes == ("model",) and c.count >= 6]
    rows = 16 // 2 // 2
    assert {c.bytes // {"f32": 4, "bf16": 2}[c.dtype] for c in layers} == {rows * 16 * 256}
    assert {c.where for c in layers} == {"forward", "backward"}


@needs_compiler
@pytest.mark.parametrize(
    ("sharding", "mesh", "accumulate"),
    [
        ("replica-fsdp", MeshConfig(replica=2, data=4), 1),
        ("replica-fsdp", MeshConfig(replica=2, data=4), 2),
        ("fsdp-tensor", MeshConfig(replica=2, data=2, model=2), 2),
    ],
)
def test_between_slices_go_a_devices_own_gradients_once(sharding, mesh, accumulate):
    """And a few sums besides: of the loss, of the gradients' norms."""
    # Each device's part of these fills its tiles.
    model = dataclasses.replace(MODEL, d_model=512, num_heads=4, head_dim=128, vocab_size=512)
    setup = setup_of(model, mesh=mesh, sharding=sharding, accumulate=accumulate)
    found = compile_setup(setup, find_topology("2xv5e:2x2"))
    between = [c for c in found.collectives if c.between_slices]
    assert {(c.op, c.axes, c.group_size) for c in between} == {("all-reduce", ("replica",), 2)}
    own = state_bytes(setup) / 3  # weights and two moments
    assert sum(c.bytes * c.count for c in between) == pytest.approx(own, rel=0.01)
    # The other exchanges stay within a slice.
    assert all("replica" not in c.axes for c in found.collectives if not c.between_slices)


@needs_compiler
@pytest.mark.parametrize(("reduce_dtype", "dtype"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_travel_in_the_type_that_was_asked_for(reduce_dtype, dtype):
    compute = Compute(remat="full", reduce_dtype=reduce_dtype)
    setup = setup_of(mesh=MeshConfig(data=8), sharding="fsdp", compute=compute)
    sent = compile_setup(setup, find_topology("v3:2x2")).collectives
    # Those of the layers, as large as a whole matrix and summed backward.
    smallest = MODEL.d_model * MODEL.num_heads * MODEL.head_dim
    sums = [c for c in sent if c.op in ("all-reduce", "reduce-scatter") and c.where == "backward"]
    layers = [c for c in sums if c.count == MODEL.num_layers and c.bytes >= 2 * smallest]
    assert layers
    assert {c.dtype for c in layers} == {dtype}


def test_the_peak_is_that_of_the_allocations():
    """Temporaries that share their memory add up to more than there is; old JAX tells less."""
    told = {"peak_memory_in_bytes": 12, "temp_size_in_bytes": 19}
    assert worker._peak_bytes(SimpleNamespace(total_allocation_bytes=13, **told)) == 13
    assert worker._peak_bytes(SimpleNamespace(**told)) == 12


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_training_step_for_this_machine(remat):
    """In this process: the very function that the other one runs."""
    setup = setup_of(
        mesh=MeshConfig(data=2, model=2),
        compute=Compute(dtype="float32", remat=remat),
        document_mask=True,
    )
    found = compile_for(setup, jax.devices())
    least, most = step_flops(setup)
    assert least <= found.flops <= most
    batch = 4 * 8 * 16 * 4  # tokens, targets, mask, documents; 8 of 16 rows
    assert found.argument_bytes == state_bytes(setup) + batch
    assert found.alias_bytes >= state_bytes(setup) - 100  # but for what is computed anew anyway
    assert found.peak_bytes > found.argument_bytes


def test_this_machine_in_a_process_of_its_own():
    """It has as many devices as this process, whatever set their number."""
    setup = setup_of(mesh=MeshConfig(data=8))
    found = compile_setup(setup, find_topology("here"))
    least, most = step_flops(setup)
    assert least <= found.flops <= most
    assert found.libtpu_version == ""


def test_loops_and_layers_one_by_one_cost_the_same():
    model = dataclasses.replace(MODEL, num_layers=2)
    one_by_one, loops = (
        compile_for(
            setup_of(model, compute=Compute(dtype="float32", scan_layers=scan), accumulate=parts),
            jax.devices(),
        ).flops
        for scan, parts in ((False, 1), (True, 4))
    )
    assert one_by_one == loops


# What is refused.


def test_a_mesh_larger_than_the_topology():
    with pytest.raises(UsageError, match=r"of 16 devices: v3:2x2 has 8: give a smaller mesh"):
        compile_setup(setup_of(mesh=MeshConfig(data=16)), find_topology("v3:2x2"))


def test_gpus_that_are_not_here():
    with pytest.raises(UsageError, match="H100:8 cannot be compiled for here"):
        compile_setup(setup_of(), find_topology("H100:8"))


def test_without_the_compiler_the_remedy_is_told():
    topology = dataclasses.replace(find_topology("v3:2x2"), compiles=False)
    with pytest.raises(UsageError, match=r"pip install 'meshlm\[plan\]'"):
        compile_setup(setup_of(), topology)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 15, "mesh": MeshConfig(data=2)}, "--batch-size 15 .* multiple of 2"),
        ({"batch_size": 16, "accumulate": 3}, "--accumulate 3: give a multiple of 3"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seq_len": 64}, "--seq-len 64: the model's context is 32"),
        ({"mesh": MeshConfig(model=3)}, "choose --mesh"),
    ],
)
def test_setups_that_do_not_divide(options, words):
    with pytest.raises(UsageError, match=words):
        check_setup(setup_of(**options))


def test_rows_follow_the_rules_of_the_setup():
    mesh = MeshConfig(data=2, model=4)
    assert setup_of(mesh=mesh, accumulate=2).rows == 4
    assert setup_of(mesh=mesh, accumulate=2, sharding="fsdp").rows == 1


def test_a_compiler_that_takes_too_long_is_ended():
    with pytest.raises(MeshLMError, match=r"more than 0\.2 s .*--no-compile"):
        compile_setup(setup_of(), find_topology("here"), timeout_s=0.2)


def test_a_compiler_that_fails_says_why_in_one_line():
    fails = "print('noise'); import sys; print('more', file=sys.stderr); raise ValueError('why')"
    with pytest.raises(MeshLMError, match=r"exit 1\): ValueError: why") as error:
        run_worker(("-c", fails), {}, find_topology("here"), 60)
    assert "\n" not in str(error.value)


@pytest.mark.long
@needs_compiler
def test_gpt_j_6b_for_a_v3_256():
    """The whole model, with the original's global batch."""
    setup = Setup(
        step=dataclasses.replace(
            step_config(PRESETS["gpt-j-6b"], compute=Compute(remat="full"), accumulate=8),
            optimizer=OPTIMIZER,
        ),
        mesh=MeshConfig(data=32, model=8),
        batch_size=512,
        seq_len=2048,
    )
    found = compile_setup(setup, find_topology("v3:16x8"))
    assert found.fits
    least, most = step_flops(setup)
    assert least <= found.flops <= most
    # Weights and both moments of the optimizer, float32 each, on 256 devices.
    assert 12 * 6.05e9 / 256 <= found.argument_bytes <= 1.1 * 12 * 6.05e9 / 256
    assert found.peak_bytes < 15 << 30
