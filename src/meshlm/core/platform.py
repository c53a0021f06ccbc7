"""The machine under JAX: flags that right numbers need, and what the devices can do.

This module is the first of MeshLM's that a program runs: it sets flags before JAX starts.
"""

import contextlib
import dataclasses
import importlib.machinery
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

    A value that the user has set stays as it is. Where the compiler for TPUs is installed and there
    are none, JAX is kept from starting it.

    Raises:
        ImportError: JAX runs already, without a flag that this version needs.
    """
    if has_tpu_compiler() and not (_has_chosen_tpus() or _may_have_tpus()):
        # JAX then takes it for not installed. Left to itself it starts it before it looks for other
        # devices, which prints errors and takes time; a list in JAX_PLATFORMS instead would make it
        # fail where one of them cannot be had.
        sys.modules[_TPU_COMPILER] = None  # type: ignore[assignment]
        os.environ.pop(_TPU_LIBRARY, None)
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


_TPU_COMPILER = "libtpu"
_TPU_LIBRARY = "TPU_LIBRARY_PATH"
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_DEVICE_FILES = Path("/dev")
_GOOGLE, _NETWORK = "0x1ae0", "0x02"


def has_tpu_compiler() -> bool:
    """True where libtpu is installed, which compiles for TPUs and drives them."""
    return importlib.machinery.PathFinder.find_spec(_TPU_COMPILER) is not None


def _has_chosen_tpus() -> bool:
    """True where the environment says what JAX shall do with TPUs."""
    if {"JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"} & os.environ.keys():
        return True
    # Importing libtpu names its own library there, and a child inherits that: it is no choice.
    named = os.environ.get(_TPU_LIBRARY)
    return named is not None and Path(named).parent.name != _TPU_COMPILER


def _may_have_tpus() -> bool:
    """True where this machine has chips of Google's, its network cards left out."""
    if any(_DEVICE_FILES.glob("accel*")) or any(_DEVICE_FILES.glob("vfio/[0-9]*")):
        return True
    for vendor in _PCI_DEVICES.glob("*/vendor"):
        with contextlib.suppress(OSError):
            kind = (vendor.parent / "class").read_text()
            if vendor.read_text().strip() == _GOOGLE and not kind.startswith(_NETWORK):
                return True
    return False


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interconnect:
    """What joins devices of one kind. None means not known."""

    link_bytes_per_s: float | None
    """One link of a chip, in one direction."""
    links: int
    """Links of a chip: two for each dim of a torus; 1 to a switch."""
    network_bytes_per_s: float | None
    """A device's share of its host's network, in one direction: between slices of TPUs, and between
    hosts of GPUs."""


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """One chip, by its maker's figures."""

    teraflops: float
    """Dense bf16."""
    gigabytes_per_s: float
    """To and from its memory."""
    gibibytes: int
    devices: int = 1
    """JAX devices in a chip."""
    link: float | None = None
    """GB/s of one link in one direction."""
    links: int = 1
    network: float | None = None
    """GB/s of a chip's share of the host's network in one direction."""


# Sources. TPU v2, v3: Jouppi et al., "A domain-specific supercomputer for training deep neural
# networks" (2020): links of 496 and 656 Gbit/s each way. v4: Jouppi et al., "TPU v4" (2023): six
# links of 50 GB/s. v5e, v5p, v6e, v7x: the system architecture pages of Google Cloud's TPU
# documentation; what they give for a chip is divided by its links (v5e 1,600 Gbit/s and v6e 3,200
# over 4, v5p and v7x 1,200 GB/s both ways over 6), the network by the chips of a host (v5e 2 x 100
# Gbit/s and v6e 4 x 200 for 8 chips). GPUs: NVIDIA's data sheets, dense; NVLink in one direction;
# the network is that of the DGX of each kind, one port a GPU (200 Gbit/s for A100, 400 since).
_TPU_SHEETS = {
    "TPU v2": _Sheet(45, 700, 16, devices=2, link=62, links=4),
    "TPU v3": _Sheet(123, 900, 32, devices=2, link=82, links=4),
    "TPU v4": _Sheet(275, 1228, 32, link=50, links=6),
    "TPU v5 lite": _Sheet(197, 819, 16, link=50, links=4, network=3.125),
    "TPU v5": _Sheet(459, 2765, 95, link=100, links=6, network=6.25),
    "TPU v6 lite": _Sheet(918, 1640, 32, link=100, links=4, network=12.5),
    "TPU7x": _Sheet(2307, 7380, 192, devices=2, link=100, links=6, network=12.5),
}
_SHEETS = {
    **_TPU_SHEETS,
    "TPU v5e": _TPU_SHEETS["TPU v5 lite"],
    "TPU v5p": _TPU_SHEETS["TPU v5"],
    "TPU v6e": _TPU_SHEETS["TPU v6 lite"],
    "NVIDIA A100-SXM4-40GB": _Sheet(312, 1555, 40, link=300, network=25),
    "NVIDIA A100-SXM4-80GB": _Sheet(312, 2039, 80, link=300, network=25),
    "NVIDIA H100 80GB HBM3": _Sheet(989, 3350, 80, link=450, network=50),
    "NVIDIA H100 PCIe": _Sheet(756, 2000, 80),
    "NVIDIA H200": _Sheet(989, 4800, 141, link=450, network=50),
    "NVIDIA B200": _Sheet(2250, 8000, 180, link=900, network=50),
}


def facts_of(kind: str, platform: str, count: int) -> DeviceFacts:
    """Returns what the data sheet says of devices of a kind, JAX's name for it."""
    sheet = _SHEETS.get(kind)
    if sheet is None:
        unknown = {"peak_flops": None, "bandwidth_bytes_per_s": None, "memory_bytes": None}
        return DeviceFacts(kind=kind, platform=platform, count=count, **unknown)
    return DeviceFacts(
        kind=kind,
        platform=platform,
        count=count,
        peak_flops=sheet.teraflops * 1e12 / sheet.devices,
        bandwidth_bytes_per_s=sheet.gigabytes_per_s * 1e9 / sheet.devices,
        memory_bytes=(sheet.gibibytes << 30) // sheet.devices,
    )


def interconnect_of(kind: str) -> Interconnect:
    """Returns what the data sheet says of the links of devices of a kind."""
    sheet = _SHEETS.get(kind)
    if sheet is None or sheet.link is None:
        return Interconnect(link_bytes_per_s=None, links=0, network_bytes_per_s=None)
    return Interconnect(
        link_bytes_per_s=sheet.link * 1e9,
        links=sheet.links,
        network_bytes_per_s=None if sheet.network is None else sheet.network * 1e9 / sheet.devices,
    )


def devices_per_chip(kind: str) -> int:
    """Returns the JAX devices that share one chip's links and memory."""
    sheet = _SHEETS.get(kind)
    return 1 if sheet is None else sheet.devices


def device_facts() -> DeviceFacts:
    """Returns the facts of the devices that JAX uses here (starts JAX)."""
    import jax

    devices = jax.devices()
    return facts_of(devices[0].device_kind, devices[0].platform, len(devices))
