"""The machine under JAX: flags that right numbers need, and what the devices can do.

This module is the first of MeshLM's that a program runs: it sets flags before JAX starts.
"""

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path

_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One XLA flag in force: its name, value and the reason for it."""

    name: str
    value: str
    reason: str


def jax_version() -> tuple[int, ...]:
    """Returns the installed JAX's version as numbers, without importing JAX."""
    parts = importlib.metadata.version("jax").split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def needed_flags() -> tuple[Flag, ...]:
    """Returns the XLA flags without which this JAX gives wrong numbers."""
    if jax_version()[:3] != (0, 10, 2):
        return ()
    return (
        Flag(
            _YNN_FLAG,
            "individual_dot",
            "JAX 0.10.2 fuses a vmapped mat-vec and a sum wrongly on CPUs (jax issue 39103)",
        ),
    )


def applied_flags() -> tuple[Flag, ...]:
    """Returns every flag in XLA_FLAGS, with the reason for those that MeshLM needs."""
    reasons = {flag.name: flag.reason for flag in needed_flags()}
    flags = []
    for word in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = word.partition("=")
        flags.append(Flag(name, value, reasons.get(name, "set by the user")))
    return tuple(flags)


def _jax_has_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(getattr(bridge, "_backends", None))


def configure() -> None:
    """Sets the flags that right numbers need; called when `meshlm` is imported.

    A value that the user has set stays as it is.

    Raises:
        ImportError: JAX runs already, without a flag that this version needs.
    """
    words = os.environ.get("XLA_FLAGS", "").split()
    missing = [
        flag for flag in needed_flags() if not any(w.split("=")[0] == flag.name for w in words)
    ]
    if not missing:
        return
    text = " ".join(f"{flag.name}={flag.value}" for flag in missing)
    if _jax_has_started():
        raise ImportError(
            f"JAX runs already and gives wrong numbers without XLA_FLAGS={text} "
            f"({missing[0].reason}): import meshlm first, set that variable, or take JAX 0.12"
        )
    os.environ["XLA_FLAGS"] = " ".join([*words, text])


_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_page_variables() -> dict[str, str]:
    """Returns the environment in which a new process's large arrays lie on huge pages.

    XLA takes the memory of a step anew from the C library each time, gigabytes of it on a CPU, and
    the kernel hands that out page by page: a fifth of the time of a training step at 4 KiB a page.
    Empty where the C library or the kernel has no such choice, or the user has made it.
    """
    try:
        is_a_choice = "[madvise]" in _HUGE_PAGES.read_text()
    except OSError:
        return {}
    if not is_a_choice or _TUNABLES in os.environ:
        return {}
    return {_TUNABLES: "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What is known of one kind of device, by its data sheet. None means not known."""

    kind: str
    platform: str
    count: int
    peak_flops: float | None
    """Dense bf16 FLOP/s of one device."""
    bandwidth_bytes_per_s: float | None
    memory_bytes: int | None


# Dense bf16 peak, memory bandwidth and memory of one JAX device, from the makers' data sheets.
# Before v4 a JAX device is one core, half a chip.
_DATA_SHEET: dict[str, tuple[float, float, int]] = {
    "TPU v2": (22.5e12, 350e9, 8 << 30),
    "TPU v3": (61.5e12, 450e9, 16 << 30),
    "TPU v4": (275e12, 1228e9, 32 << 30),
    "TPU v5 lite": (197e12, 819e9, 16 << 30),
    "TPU v5e": (197e12, 819e9, 16 << 30),
    "TPU v5": (459e12, 2765e9, 95 << 30),
    "TPU v5p": (459e12, 2765e9, 95 << 30),
    "TPU v6 lite": (918e12, 1640e9, 32 << 30),
    "TPU v6e": (918e12, 1640e9, 32 << 30),
    "NVIDIA A100-SXM4-40GB": (312e12, 1555e9, 40 << 30),
    "NVIDIA A100-SXM4-80GB": (312e12, 2039e9, 80 << 30),
    "NVIDIA H100 80GB HBM3": (989e12, 3350e9, 80 << 30),
    "NVIDIA H100 PCIe": (756e12, 2000e9, 80 << 30),
    "NVIDIA H200": (989e12, 4800e9, 141 << 30),
    "NVIDIA B200": (2250e12, 8000e9, 180 << 30),
}


def device_facts() -> DeviceFacts:
    """Returns the facts of the devices that JAX uses here (starts JAX)."""
    import jax

    devices = jax.devices()
    kind = devices[0].device_kind
    peak, bandwidth, memory = _DATA_SHEET.get(kind, (None, None, None))
    return DeviceFacts(
        kind=kind,
        platform=devices[0].platform,
        count=len(devices),
        peak_flops=peak,
        bandwidth_bytes_per_s=bandwidth,
        memory_bytes=memory,
    )
