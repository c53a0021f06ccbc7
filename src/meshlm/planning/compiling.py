"""What the compiler says of a training step: its memory, FLOPs, traffic and collectives.

The step is compiled in a process of its own, `worker.py`: the compiler for TPUs takes variables
that must stand before JAX starts, prints what it likes, and may be killed when it takes too long.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from meshlm.core.config import from_dict, to_dict
from meshlm.core.errors import MeshLMError, UsageError
from meshlm.planning.hlo import Collective, Traffic, Where
from meshlm.planning.setup import Setup, check_setup
from meshlm.planning.topology import Topology, check_devices

__all__ = ["Collective", "Compiled", "Traffic", "Where", "compile_setup"]

HOW_TO_COMPILE = "install the compiler: pip install 'meshlm[plan]'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiled step. Bytes and FLOPs are of one device and one step; 0 where it was refused."""

    fits: bool
    """The compiler has found room for it. On a CPU it does not look."""
    message: str = ""
    """The compiler's own words where it refused."""
    argument_bytes: int = 0
    """State and batch."""
    output_bytes: int = 0
    alias_bytes: int = 0
    """Outputs that take the memory of arguments: the new state that of the old."""
    temp_bytes: int = 0
    """The rest of the peak: gradients, activations, gathered weights, gaps between them."""
    peak_bytes: int = 0
    """All allocations: arguments, outputs with memory of their own, and temporaries, of which
    those share their memory that do not live at the same time."""
    available_bytes: int | None = None
    """What the compiler lets a program use of a device's memory, where it says so."""
    flops: float = 0.0
    """Of the matrix products, loops multiplied by their trips; those inside of kernels written by
    hand (splash attention) are not told."""
    bytes_accessed: float = 0.0
    """Read from and written to the device's memory, loops multiplied by their trips."""
    traffic: tuple[Traffic, ...] = ()
    """Both, by their relation: FLOPs a byte."""
    collectives: tuple[Collective, ...] = ()
    """Largest first."""
    lower_s: float = 0.0
    compile_s: float = 0.0
    jax_version: str = ""
    libtpu_version: str = ""
    """Empty where it was not compiled for TPUs."""


# What the compiler asks of the machine that it runs on. Where there are no TPUs it would try to
# find them, and their neighbours by the network.
_WITHOUT_TPUS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_VIRTUAL_DEVICES = "--xla_force_host_platform_device_count"


def compile_setup(setup: Setup, topology: Topology, *, timeout_s: float = 900) -> Compiled:
    """Returns what the compiler says of the very training step on this topology.

    Raises:
        UsageError: setup and topology do not fit, or nothing here compiles for the topology.
        MeshLMError: the compiler failed, or took longer than `timeout_s`.
    """
    check_setup(setup)
    check_devices(setup.mesh, topology)
    if not topology.compiles:
        missing = topology.facts.platform == "tpu"
        reason = f"libtpu is missing: {HOW_TO_COMPILE}" if missing else "only a machine with it can"
        raise UsageError(f"--topology {topology.name} cannot be compiled for here: {reason}")
    request = {"setup": to_dict(setup), "topology": topology.name}
    return run_worker(("-m", "meshlm.planning.worker"), request, topology, timeout_s)


def run_worker(
    program: Sequence[str], request: dict[str, Any], topology: Topology, timeout_s: float
) -> Compiled:
    """Returns what a Python program (`worker.answer_with`) answers, where it can compile for pods.

    Raises:
        MeshLMError: it failed, or took longer than `timeout_s`.
    """
    try:
        finished = subprocess.run(
            [sys.executable, *program],
            input=json.dumps(request),
            env=_environment(topology),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise MeshLMError(
            f"the compiler took more than {timeout_s:g} s for --topology {topology.name}: leave it "
            "at the formula (--no-compile), or give the machine more cores"
        ) from None
    if finished.returncode != 0:
        raise MeshLMError(
            f"the compiler failed for --topology {topology.name} "
            f"(exit {finished.returncode}): {_last_words(finished.stderr)}"
        )
    return from_dict(Compiled, json.loads(finished.stdout), "the compiler's answer")


def _environment(topology: Topology) -> dict[str, str]:
    """Returns the environment of the compiling process."""
    # A program out of the cache would be no measurement of the compiler.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if topology.name != "here":
        return environment | _WITHOUT_TPUS
    if topology.facts.platform == "cpu":
        words = os.environ.get("XLA_FLAGS", "").split()
        kept = [word for word in words if not word.startswith(_VIRTUAL_DEVICES)]
        flags = [*kept, f"{_VIRTUAL_DEVICES}={topology.num_devices}"]
        return environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    # This process may hold the most of the memory of the devices.
    return environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def _last_words(stderr: str) -> str:
    """Returns the line that tells why, of all that was printed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "error: " in line]
    return (errors or lines or ["it said nothing"])[-1][:500]
