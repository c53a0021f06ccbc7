"""Compiles one training step for a topology, in a process of its own: JSON in, JSON out.

`compiling.compile_setup` starts it with the variables that a compiler for absent TPUs needs. They
must stand before JAX starts, and what the compiler prints must not reach the user's terminal.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from meshlm.core.config import from_dict, to_dict
from meshlm.core.sharding import AXES, MeshConfig, make_mesh, sharding_of, use_mesh
from meshlm.planning.compiling import Compiled
from meshlm.planning.hlo import read_program
from meshlm.planning.setup import Setup
from meshlm.planning.topology import compiler_name
from meshlm.step import StepBatch, abstract_state, compile_train_step


def target_devices(name: str) -> list[Any]:
    """Returns the devices of a topology: this machine's, or TPUs that are not here."""
    if name == "here":
        return jax.devices()
    # Only here: importing it is cheap, but nothing else may come to depend on it.
    from jax.experimental import topologies

    slice_name, slices = compiler_name(name)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    # Without it each of the two cores of a v4 chip is a device, which they are in no real run.
    if slice_name.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    found = topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **options)
    return list(found.devices)


def lower_step(setup: Setup, devices: list[Any]) -> jax.stages.Lowered:
    """Returns the very training step of `setup`, traced and lowered for these devices."""
    mesh = make_mesh(setup.mesh, devices)
    with use_mesh(mesh, setup.rules):
        rows = sharding_of(mesh, "batch", None)
        shape = (setup.batch_size, setup.seq_len)
        ids: Any = jax.ShapeDtypeStruct(shape, "int32", sharding=rows)
        mask: Any = jax.ShapeDtypeStruct(shape, "float32", sharding=rows)
        batch = StepBatch(
            tokens=ids,
            targets=ids,
            loss_mask=mask,
            segment_ids=ids if setup.document_mask else None,
        )
        step: Any = compile_train_step(setup.step)
        return step.lower(abstract_state(setup.step, mesh), batch)


def compile_for(setup: Setup, devices: list[Any]) -> Compiled:
    """Returns what the compiler says of the very training step of `setup`."""
    platform = devices[0].platform
    return compile_program(lambda: lower_step(setup, devices), setup.mesh, platform)


def compile_program(
    lower: Callable[[], jax.stages.Lowered], mesh: MeshConfig, platform: str
) -> Compiled:
    """Returns what the compiler says of any step; a program too large is an answer too."""
    began_s = time.monotonic()
    lowered = lower()
    lowered_s = time.monotonic()
    facts: dict[str, Any] = {
        "lower_s": lowered_s - began_s,
        "jax_version": jax.__version__,
        "libtpu_version": _version_of("libtpu") if platform == "tpu" else "",
    }
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        facts |= {"compile_s": time.monotonic() - lowered_s, **_refusal(str(error))}
        return Compiled(fits=False, **facts)
    facts["compile_s"] = time.monotonic() - lowered_s
    memory: Any = program.memory_analysis()
    text = program.as_text()
    assert text is not None
    read = read_program(text, {axis: getattr(mesh, axis) for axis in AXES})
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    alias, peak = memory.alias_size_in_bytes, _peak_bytes(memory)
    return Compiled(
        fits=True,
        argument_bytes=arguments,
        output_bytes=outputs,
        alias_bytes=alias,
        temp_bytes=peak - arguments - outputs + alias,
        peak_bytes=peak,
        flops=read.flops,
        bytes_accessed=read.bytes_accessed,
        traffic=read.traffic,
        collectives=read.collectives,
        **facts,
    )


def _peak_bytes(memory: Any) -> int:
    """Returns what all allocations take together, which is what a compiler finds room for or not.

    `temp_size_in_bytes` is no part of it: for TPUs it counts values that share their memory, and
    is over 19 GB for programs that are compiled for 16. JAX 0.10 does not tell of the allocations;
    the most that is in use at once leaves out the gaps between them.
    """
    return getattr(memory, "total_allocation_bytes", 0) or memory.peak_memory_in_bytes


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_AVAILABLE = re.compile(r"exceeds available HBM \(([\d.]+)([BKMG])\)")


def _refusal(error: str) -> dict[str, Any]:
    """Returns what the compiler says where a program finds no room."""
    message = next((line for line in error.splitlines() if line.strip()), "")
    found = _AVAILABLE.search(error)
    available = None if found is None else int(float(found.group(1)) * _UNITS[found.group(2)])
    return {"message": message.strip(), "available_bytes": available}


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def answer_with(compile_request: Callable[[dict[str, Any]], Compiled]) -> None:
    """Reads a request from the standard input and writes the `Compiled` to the output."""
    # What the compiler prints goes to the other one.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    compiled = compile_request(json.load(sys.stdin))
    with answer:
        json.dump(to_dict(compiled), answer)


def _compile_request(request: dict[str, Any]) -> Compiled:
    setup = from_dict(Setup, request["setup"], "setup")
    return compile_for(setup, target_devices(request["topology"]))


if __name__ == "__main__":
    answer_with(_compile_request)
