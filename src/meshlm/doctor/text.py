"""The diagnosis as text for a terminal."""

from collections.abc import Sequence

from meshlm.core.kernels import Kernels
from meshlm.doctor.diagnosis import Diagnosis
from meshlm.doctor.installed import Extra, Library
from meshlm.doctor.machine import Machine, gib


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal."""
    machine = diagnosis.machine
    sections = [
        [
            ("MeshLM", diagnosis.meshlm),
            ("Python", diagnosis.python),
            ("system", machine.platform),
            ("CPU", f"{machine.cpu}, {machine.cores} cores usable"),
            ("CPU features", " ".join(machine.cpu_features) or "none of note"),
            ("memory", _memory_text(machine)),
            ("free disk here", gib(machine.disk_free_bytes)),
            ("accelerators", ", ".join(machine.accelerators) or "none"),
        ],
        _jax_rows(diagnosis),
        [(one.name, _library_text(one)) for one in diagnosis.libraries],
        [(f"meshlm[{one.name}]", _extra_text(one)) for one in diagnosis.extras]
        + [(name, f"{v or 'absent'} (not needed)") for name, v in diagnosis.also_installed.items()],
        [(one.name, "ok" if one.passed else f"WRONG: {one.detail}") for one in diagnosis.checks],
    ]
    width = max(len(name) for rows in sections for name, _ in rows)
    blocks = ["\n".join(f"{name:<{width}}  {text}" for name, text in s) for s in sections if s]
    return "\n\n".join([*blocks, _verdict(diagnosis.problems)]) + "\n"


def _memory_text(machine: Machine) -> str:
    return f"{gib(machine.memory_bytes)}, {gib(machine.memory_available_bytes)} available"


def _jax_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    facts = diagnosis.devices
    if facts is None:
        rows = [("JAX devices", "JAX does not start")]
    else:
        peak = f"{facts.peak_flops / 1e12:.4g} TFLOP/s bf16 each" if facts.peak_flops else None
        known = peak or "peak FLOP/s unknown, so MFU is null"
        rows = [("JAX devices", f"{facts.count} x {facts.kind} ({facts.platform}), {known}")]
    rows += [(name, number) for name, number in diagnosis.jax_packages.items()]
    rows += [("XLA flag", f"{f.name}={f.value}: {f.reason}") for f in diagnosis.flags]
    if not diagnosis.flags:
        rows.append(("XLA flags", "none, and this JAX needs none"))
    rows += [("environment", f"{name}={value}") for name, value in diagnosis.environment.items()]
    rows.append(("compile cache", diagnosis.compile_cache or "off"))
    if diagnosis.kernels is not None:
        rows.append(("CPU kernels", _kernels_text(diagnosis.kernels)))
    return rows


def _kernels_text(kernels: Kernels) -> str:
    return kernels.detail if kernels.ready else f"none, decoding is slower: {kernels.detail}"


def _library_text(library: Library) -> str:
    if library.satisfied:
        return str(library.installed)
    return f"{library.installed or 'MISSING'} (needs {library.requirement})"


def _extra_text(extra: Extra) -> str:
    if not extra.missing:
        return "complete"
    return f"missing {', '.join(extra.missing)}: pip install 'meshlm[{extra.name}]'"


def _verdict(problems: Sequence[str]) -> str:
    if not problems:
        return "No problems found."
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{count}:", *(f"  - {problem}" for problem in problems)])
