"""The flags that right numbers need, and the facts about devices."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from meshlm.core import platform

YNN = "--xla_cpu_experimental_ynn_fusion_type"
WRONG_JAX = (0, 10, 2)
INSTALLED = platform.jax_version()[:3]

# jax issue 39103. Whole numbers below 2**53, so numpy's float64 is the exact answer.
MATVEC_THEN_SUM = """
import sys
if "meshlm" in sys.argv:
    import meshlm
import jax, jax.numpy as jnp, numpy as np
count = 32_769
row = np.arange(count, dtype=np.float32)
rows = np.stack((row, 0 * row, 0 * row), axis=1)
matrix = jnp.eye(3)
squares = jax.jit(jax.vmap(lambda x: jnp.sum((matrix @ x) ** 2)))(rows)
exact = (rows.astype(np.float64) ** 2).sum(1)
print("right" if np.allclose(squares, exact, rtol=1e-6) else "wrong")
"""
IMPORT_TOO_LATE = """
import jax
jax.devices()
import meshlm
"""


def run_python(code: str, *arguments: str, flags: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_vmapped_matvec_and_a_sum_are_right_with_meshlm_imported():
    finished = run_python(MATVEC_THEN_SUM, "meshlm")
    assert finished.stdout == "right\n", finished.stderr


@pytest.mark.skipif(INSTALLED != WRONG_JAX, reason="only JAX 0.10.2 is wrong here")
def test_without_meshlm_it_is_wrong():
    # If this fails, the flag is not needed any more.
    assert run_python(MATVEC_THEN_SUM).stdout == "wrong\n"


@pytest.mark.skipif(INSTALLED != WRONG_JAX, reason="only JAX 0.10.2 needs a flag")
def test_importing_meshlm_too_late_fails_with_the_remedy():
    finished = run_python(IMPORT_TOO_LATE)
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: JAX runs already")
    assert f"XLA_FLAGS={YNN}=individual_dot" in last
    assert "import meshlm first" in last
    # The remedy works.
    assert run_python(IMPORT_TOO_LATE, flags=f"{YNN}=individual_dot").returncode == 0


@pytest.mark.skipif(INSTALLED == WRONG_JAX, reason="JAX 0.10.2 needs the flag first")
def test_meshlm_may_be_imported_late_where_jax_is_right():
    finished = run_python(IMPORT_TOO_LATE)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def jax_version(monkeypatch):
    """Pretends an installed version, and that JAX has not started."""

    def pretend(*version: int, started: bool = False) -> None:
        monkeypatch.setattr(platform, "jax_version", lambda: version)
        monkeypatch.setattr(platform, "_jax_has_started", lambda: started)

    return pretend


@pytest.mark.parametrize("version", [(0, 10, 1), (0, 10, 3), (0, 11, 1), (0, 12, 0, 1)])
def test_other_versions_get_no_flag(jax_version, monkeypatch, version):
    jax_version(*version, started=True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    platform.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"


def test_the_flag_joins_those_that_are_there(jax_version, monkeypatch):
    jax_version(0, 10, 2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b")
    platform.configure()
    assert os.environ["XLA_FLAGS"] == f"--xla_a=1 --xla_b {YNN}=individual_dot"
    platform.configure()
    assert os.environ["XLA_FLAGS"].count(YNN) == 1
    flags = {flag.name: flag for flag in platform.applied_flags()}
    assert list(flags) == ["--xla_a", "--xla_b", YNN]
    assert "39103" in flags[YNN].reason
    assert flags["--xla_a"].value == "1"
    assert flags["--xla_a"].reason == "set by the user"


def test_the_flag_alone(jax_version, monkeypatch):
    jax_version(0, 10, 2)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    platform.configure()
    assert os.environ["XLA_FLAGS"] == f"{YNN}=individual_dot"


@pytest.mark.parametrize("started", [False, True])
def test_the_users_own_value_stays(jax_version, monkeypatch, started):
    jax_version(0, 10, 2, started=started)
    monkeypatch.setenv("XLA_FLAGS", f"{YNN}=")
    platform.configure()
    assert os.environ["XLA_FLAGS"] == f"{YNN}="


def test_too_late(jax_version, monkeypatch):
    jax_version(0, 10, 2, started=True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    with pytest.raises(ImportError, match="import meshlm first"):
        platform.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"


def test_the_versions_numbers():
    import jax

    assert platform.jax_version()[:3] == jax.__version_info__[:3]


def test_the_facts_of_these_devices():
    facts = platform.device_facts()
    assert (facts.platform, facts.count) == ("cpu", 8)
    # No data sheet: unknown, and not a guess.
    assert (facts.peak_flops, facts.bandwidth_bytes_per_s, facts.memory_bytes) == (None,) * 3


class Device:
    def __init__(self, kind: str, platform: str) -> None:
        self.device_kind, self.platform = kind, platform


# Dense bf16 peak of a chip in TFLOP/s, and JAX devices a chip.
@pytest.mark.parametrize(
    ("kind", "chip_teraflops", "devices_a_chip"),
    [
        ("TPU v2", 45, 2),
        ("TPU v3", 123, 2),
        ("TPU v4", 275, 1),
        ("TPU v5 lite", 197, 1),
        ("TPU v5", 459, 1),
        ("TPU v6 lite", 918, 1),
        ("TPU7x", 2307, 2),
    ],
)
def test_the_facts_of_a_tpu(monkeypatch, kind, chip_teraflops, devices_a_chip):
    import jax

    monkeypatch.setattr(jax, "devices", lambda: [Device(kind, "tpu")] * 16)
    facts = platform.device_facts()
    assert (facts.kind, facts.platform, facts.count) == (kind, "tpu", 16)
    assert facts.peak_flops == chip_teraflops * 1e12 / devices_a_chip
    assert platform.devices_per_chip(kind) == devices_a_chip
    links = platform.interconnect_of(kind)
    assert links.links in (4, 6)
    assert links.link_bytes_per_s is not None


def test_of_a_kind_without_a_data_sheet_nothing_is_claimed():
    facts = platform.facts_of("TPU v99", "tpu", 4)
    assert (facts.kind, facts.count) == ("TPU v99", 4)
    assert (facts.peak_flops, facts.bandwidth_bytes_per_s, facts.memory_bytes) == (None,) * 3
    links = platform.interconnect_of("TPU v99")
    assert (links.link_bytes_per_s, links.network_bytes_per_s) == (None, None)
    assert platform.devices_per_chip("TPU v99") == 1


# libtpu is there to compile for TPUs that are not.

DEVICES = "import meshlm, jax; print(jax.devices()[0].platform)"


def devices_with(code: str = DEVICES, **variables: str) -> subprocess.CompletedProcess[str]:
    """JAX's devices as a user gets them, who has chosen no platform but in `variables`."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "XLA_FLAGS": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


needs_compiler = pytest.mark.skipif(
    not platform.has_tpu_compiler(), reason="libtpu is not installed (extra plan)"
)


@needs_compiler
@pytest.mark.skipif(platform._may_have_tpus(), reason="there are TPUs here")
def test_the_compiler_for_tpus_is_not_heard_where_there_are_none():
    finished = devices_with()
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout in ("cpu\n", "gpu\n")


@needs_compiler
@pytest.mark.skipif(platform._may_have_tpus(), reason="there are TPUs here")
def test_who_chooses_a_platform_has_it():
    finished = devices_with(JAX_PLATFORMS="tpu")
    assert finished.returncode != 0  # it is tried, and there are none
    assert "tpu" in finished.stderr.lower()
    assert devices_with(JAX_PLATFORMS="cpu").stdout == "cpu\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Pretends a machine's PCI devices, (vendor, class) each, and its device files."""

    def pretend(*pci: tuple[str, str], files: tuple[str, ...] = ()) -> None:
        for number, (vendor, kind) in enumerate(pci):
            folder = tmp_path / "pci" / f"0000:00:{number:02}.0"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(vendor + "\n")
            (folder / "class").write_text(kind + "\n")
        for name in files:
            path = tmp_path / "dev" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.setattr(platform, "_PCI_DEVICES", tmp_path / "pci")
        monkeypatch.setattr(platform, "_DEVICE_FILES", tmp_path / "dev")
        monkeypatch.setattr(platform, "has_tpu_compiler", lambda: True)
        for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(platform, "needed_flags", lambda: ())
        monkeypatch.setitem(sys.modules, "libtpu", "as it was")  # and restored afterwards

    return pretend


@pytest.mark.parametrize(
    ("pci", "files", "kept"),
    [
        ((), (), False),
        ((("0x8086", "0x020000"), ("0x10de", "0x030200")), ("nvidia0", "vfio/vfio"), False),
        ((("0x1ae0", "0x020000"),), (), False),  # a network card of Google's
        ((("0x8086", "0x020000"), ("0x1ae0", "0x120000")), (), True),
        ((), ("accel0",), True),
        ((), ("vfio/0",), True),
    ],
    ids=["nothing", "nvidia", "gvnic", "pci", "accel", "vfio"],
)
def test_libtpu_stays_where_there_may_be_tpus(machine, pci, files, kept):
    machine(*pci, files=files)
    platform.configure()
    assert sys.modules["libtpu"] == ("as it was" if kept else None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_PLATFORMS", ""),
        ("JAX_FORCE_TPU_INIT", "1"),
        ("TPU_LIBRARY_PATH", "/usr/lib/other/libtpu.so"),
    ],
)
def test_libtpu_stays_where_the_user_has_chosen(machine, monkeypatch, name, value):
    machine()
    monkeypatch.setenv(name, value)
    platform.configure()
    assert sys.modules["libtpu"] == "as it was"


def test_a_path_that_libtpu_has_set_itself_is_no_choice(machine, monkeypatch):
    machine()
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/a/site-packages/libtpu/libtpu.so")
    platform.configure()
    assert sys.modules["libtpu"] is None
    assert "TPU_LIBRARY_PATH" not in os.environ


@needs_compiler
@pytest.mark.skipif(platform._may_have_tpus(), reason="there are TPUs here")
def test_it_is_not_heard_either_where_jax_was_imported_first():
    finished = devices_with(code="import jax, meshlm; print(jax.devices()[0].platform)")
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize(
    ("kernel", "tunables", "given"),
    [
        ("always [madvise] never", None, True),
        ("[always] madvise never", None, False),
        ("always madvise [never]", None, False),
        ("always [madvise] never", "glibc.malloc.check=1", False),
        (None, None, False),
    ],
)
def test_huge_pages_are_asked_for_where_that_is_a_choice(
    kernel, tunables, given, tmp_path, monkeypatch
):
    setting = tmp_path / "enabled"
    if kernel is not None:
        setting.write_text(kernel + "\n")
    monkeypatch.setattr(platform, "_HUGE_PAGES", setting)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    wanted = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if given else {}
    assert platform.huge_page_variables() == wanted
