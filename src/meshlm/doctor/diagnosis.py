"""All that the doctor finds, and the problems that follow from it."""

import dataclasses
import os
import platform
import re
import sys
from collections.abc import Sequence

from meshlm.core.kernels import Kernels
from meshlm.core.platform import DeviceFacts, Flag, applied_flags, device_facts
from meshlm.doctor.checks import Check, run_checks
from meshlm.doctor.installed import Extra, Library, read_requirements, version
from meshlm.doctor.machine import Machine, gib, read_machine
from meshlm.ops.cpu.library import kernels

_GPU_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_JAX_PACKAGES = ("jaxlib", "libtpu", *_GPU_PLUGINS)
_NOT_NEEDED = ("torch", "transformers")
_LOW_DISK_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that the doctor found."""

    meshlm: str
    python: str
    machine: Machine
    libraries: Sequence[Library]
    extras: Sequence[Extra]
    also_installed: dict[str, str | None]
    """Versions of libraries that MeshLM never imports; None where absent."""
    devices: DeviceFacts | None
    """None if JAX does not start."""
    jax_packages: dict[str, str]
    """Versions of JAX's own parts that are installed: its runtime and device plugins."""
    flags: Sequence[Flag]
    environment: dict[str, str]
    """The JAX_* variables in force, and those that limit threads or devices."""
    compile_cache: str | None
    kernels: Kernels | None
    """Whether decoding on the CPU has its kernels; None where JAX does not start or has others."""
    checks: Sequence[Check]
    problems: Sequence[str]
    """What stands in the way, each with its remedy."""

    @property
    def exit_code(self) -> int:
        """0 without problems, else 1."""
        return 1 if self.problems else 0

    def to_dict(self) -> dict[str, object]:
        """The diagnosis as JSON-ready values."""
        return dataclasses.asdict(self)


def diagnose() -> Diagnosis:
    """The diagnosis of this machine and installation. Starts JAX, needs a second or two."""
    machine = read_machine()
    libraries, extras = read_requirements("meshlm")
    devices, start_error = _start_jax()
    checks = run_checks() if devices is not None else []
    problems = [
        *_library_problems(libraries),
        *([] if start_error is None else [f"JAX does not start: {start_error}"]),
        *(f"{one.name} is wrong: {one.detail}" for one in checks if not one.passed),
        *accelerator_problems(devices.platform if devices else "none", machine.accelerators),
        *_machine_problems(machine),
    ]
    return Diagnosis(
        meshlm=version("meshlm") or "not installed",
        python=f"{platform.python_version()} ({sys.executable})",
        machine=machine,
        libraries=libraries,
        extras=extras,
        also_installed={name: version(name) for name in _NOT_NEEDED},
        devices=devices,
        jax_packages={name: v for name in _JAX_PACKAGES if (v := version(name)) is not None},
        flags=applied_flags(),
        environment=_environment(),
        compile_cache=_compile_cache(),
        kernels=kernels() if devices is not None and devices.platform == "cpu" else None,
        checks=checks,
        problems=problems,
    )


def accelerator_problems(backend: str, accelerators: Sequence[str]) -> list[str]:
    """One line for each accelerator that JAX could use and does not, with the remedy."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen:  # somebody decided what JAX uses
        return []
    problems = []
    for seen in accelerators:
        if "NVIDIA" in seen and backend != "gpu":
            driver = re.search(r"driver (\d+)", seen)
            # CUDA 13 needs driver 580, CUDA 12 is content with 525.
            cuda = "cuda12" if driver and int(driver[1]) < 580 else "cuda13"
            problems.append(_unused(seen, backend, f"jax-{cuda}-plugin", f"jax[{cuda}]"))
        if "TPU" in seen and backend != "tpu":
            problems.append(_unused(seen, backend, "libtpu", "jax[tpu]"))
        if "AMD" in seen and backend != "gpu":
            problems.append(_unused(seen, backend, "jax-rocm7-plugin", "jax[rocm7-local]"))
    return problems


def _unused(seen: str, backend: str, plugin: str, extra: str) -> str:
    """What to do about one accelerator that is seen and not used."""
    if version(plugin) is None:
        return f"{seen} is here but JAX runs on {backend}: pip install '{extra}'"
    return (
        f"{seen} and {plugin} are here but JAX runs on {backend}: "
        "run with JAX_PLATFORMS unset and TF_CPP_MIN_LOG_LEVEL=0 to see why"
    )


def _start_jax() -> tuple[DeviceFacts | None, str | None]:
    """(devices, None), or (None, why not): a broken plugin or driver can raise anything."""
    try:
        return device_facts(), None
    except Exception as error:
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def _environment() -> dict[str, str]:
    names = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "OMP_NUM_THREADS", "LIBTPU_INIT_ARGS")
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in names or name.startswith("JAX_")
    }


def _compile_cache() -> str | None:
    try:
        import jax
    except Exception:
        return None
    return jax.config.jax_compilation_cache_dir


def _library_problems(libraries: Sequence[Library]) -> list[str]:
    return [
        f"{one.requirement} is needed, {one.installed or 'nothing'} is installed: "
        f"pip install '{one.requirement}'"
        for one in libraries
        if not one.satisfied
    ]


def _machine_problems(machine: Machine) -> list[str]:
    if machine.disk_free_bytes >= _LOW_DISK_BYTES:
        return []
    free = gib(machine.disk_free_bytes)
    return [f"{free} are free here, too little for checkpoints: make room, or work elsewhere"]
