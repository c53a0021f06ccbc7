"""The computer as this process sees it, read from the kernel's files."""

import dataclasses
import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve"),
)

# PCI numbers of Google, and of its TPUs v2 and v3, v4, v5p, v5e, v6e, 7x, 8i and 8t.
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x0083", "0x007c")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The computer as this process sees it. None means that it could not be read."""

    platform: str
    cpu: str
    cpu_features: Sequence[str]
    """The instruction sets that matter to matmuls, in the kernel's names."""
    cores: int
    """Cores this process may use."""
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int
    """Free space for the working folder."""
    accelerators: Sequence[str]
    """Accelerators that the operating system shows, whether or not JAX uses them."""


def read_machine(root: Path = Path("/")) -> Machine:
    """The machine, read from the files below `root`."""
    cpu, features = _read_cpu(root)
    total, available = _read_memory(root)
    return Machine(
        platform=platform.platform(),
        cpu=cpu,
        cpu_features=features,
        cores=_usable_cores(),
        memory_bytes=total,
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        accelerators=_read_accelerators(root),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_cpu(root: Path) -> tuple[str, list[str]]:
    text = _read_text(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return (model[1] if model else platform.machine()), [f for f in _CPU_FEATURES if f in present]


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_memory(root: Path) -> tuple[int | None, int | None]:
    """(total, available) bytes; a container's limit counts as the total if it is lower."""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read_text(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" not in kib:
        return None, None
    total = int(kib["MemTotal"]) * 1024
    available = int(kib.get("MemAvailable", kib["MemTotal"])) * 1024
    limit = _read_text(root / "sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = _read_text(root / "sys/fs/cgroup/memory.current").strip()
        left = int(limit) - (int(used) if used.isdigit() else 0)
        total, available = int(limit), min(available, max(0, left))
    return total, available


def _read_accelerators(root: Path) -> list[str]:
    found = []
    gpus = sum(path.name[6:].isdigit() for path in root.glob("dev/nvidia*"))
    if gpus or (root / "dev/dxg").exists():  # the second is Windows' subsystem for Linux
        driver = re.search(r"(\d+)\.\d+", _read_text(root / "proc/driver/nvidia/version"))
        version = f" (driver {driver[1]})" if driver else ""
        found.append(f"{gpus or 1} NVIDIA GPU{'s' if gpus > 1 else ''}{version}")
    chips = sum(map(_is_tpu, root.glob("sys/bus/pci/devices/*.0")))
    if chips:
        found.append(f"{chips} Google TPU chip{'s' if chips > 1 else ''}")
    if (root / "dev/kfd").exists():
        found.append("AMD GPU")
    return found


def _is_tpu(device: Path) -> bool:
    vendor, number = _read_text(device / "vendor"), _read_text(device / "device")
    return vendor.strip() == _GOOGLE and number.strip() in _TPUS


def gib(size: int | None) -> str:
    """A size for people, in GiB."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
