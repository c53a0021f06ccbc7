import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import psutil
import pytest

from meshlm.core import platform as core_platform
from meshlm.doctor import checks, diagnose, diagnosis, installed, machine, render
from meshlm.doctor.diagnosis import accelerator_problems
from meshlm.doctor.installed import read_requirements

GIB = 2**30


@pytest.fixture(scope="module")
def here():
    return diagnose()


class TestHere:
    def test_a_working_installation_has_no_problems(self, here):
        assert here.problems == []
        assert here.exit_code == 0
        assert [one.passed for one in here.checks] == [True, True, True]

    def test_facts_that_psutil_and_jax_know_too(self, here):
        assert here.machine.memory_bytes <= psutil.virtual_memory().total
        assert here.machine.cores == len(psutil.Process().cpu_affinity())
        assert here.devices.count == jax.device_count()
        assert here.jax_packages["jaxlib"] == jax.lib.__version__
        versions = {one.name: one.installed for one in here.libraries}
        assert versions["numpy"] == np.__version__
        assert versions["jax"] == jax.__version__

    def test_json(self, here):
        again = json.loads(json.dumps(here.to_dict()))
        assert again["devices"]["platform"] == "cpu"
        assert again["environment"]["JAX_PLATFORMS"] == "cpu"
        assert again["machine"]["cores"] == here.machine.cores

    def test_text(self, here):
        text = render(here)
        assert text.endswith("No problems found.\n")
        assert jax.__version__ in text
        for flag in here.flags:
            assert f"{flag.name}={flag.value}: {flag.reason}" in text
        columns = {line.index("  ") for line in text.splitlines() if line.startswith("numpy")}
        assert len(columns) == 1

    def test_text_of_problems(self, here):
        bad = dataclasses.replace(
            here,
            devices=None,
            flags=(),
            checks=[checks.Check(name="matmul float32", passed=False, detail="3 entries differ")],
            libraries=[
                installed.Library(
                    name="optax", requirement="optax>=9", installed="0.2", satisfied=False
                )
            ],
            problems=["one: do this", "two: do that"],
        )
        text = render(bad)
        assert bad.exit_code == 1
        assert "WRONG: 3 entries differ" in text
        assert "0.2 (needs optax>=9)" in text
        assert "JAX does not start" in text
        assert text.endswith("2 problems:\n  - one: do this\n  - two: do that\n")


def test_no_name_is_looked_up_and_no_connection_made():
    """Run apart, with an audit hook that ends the process at the first attempt."""
    program = (
        "import sys, os\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'):\n"
        "        os.write(2, f'{event} {args}'.encode()); os._exit(9)\n"
        "sys.addaudithook(hook)\n"
        "from meshlm.doctor import diagnose\n"
        "sys.exit(diagnose().exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class TestMachine:
    def read(self, root):
        return machine.read_machine(root)

    def write(self, root, **files):
        for name, text in files.items():
            path = root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def test_x86(self, tmp_path):
        self.write(
            tmp_path,
            proc__cpuinfo="processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu "
            "avx2 amx_tile amx_bf16 avx512_bf16\nbogomips\t: 1\n",
            proc__meminfo="MemTotal:  16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n",
        )
        found = self.read(tmp_path)
        assert found.cpu == "Intel(R) Xeon(R)"
        assert found.cpu_features == ["avx2", "avx512_bf16", "amx_tile", "amx_bf16"]
        assert (found.memory_bytes, found.memory_available_bytes) == (16 * GIB, 8 * GIB)
        assert found.accelerators == []

    def test_arm(self, tmp_path):
        self.write(tmp_path, proc__cpuinfo="processor : 0\nFeatures\t: fp asimd bf16 i8mm\n")
        found = self.read(tmp_path)
        assert found.cpu_features == ["asimd", "bf16", "i8mm"]
        assert found.cpu
        assert found.memory_bytes is None

    def test_a_containers_limit_counts(self, tmp_path):
        self.write(tmp_path, proc__meminfo="MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
        cgroup = tmp_path / "sys/fs/cgroup"
        cgroup.mkdir(parents=True)
        (cgroup / "memory.max").write_text(f"{4 * GIB}\n")
        (cgroup / "memory.current").write_text(f"{1 * GIB}\n")
        found = self.read(tmp_path)
        assert (found.memory_bytes, found.memory_available_bytes) == (4 * GIB, 3 * GIB)
        (cgroup / "memory.max").write_text("max\n")
        assert self.read(tmp_path).memory_bytes == 16 * GIB

    def test_accelerators(self, tmp_path):
        version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.163.01  Tue Apr 8\n"
        self.write(
            tmp_path,
            dev__nvidia0="",
            dev__nvidia1="",
            dev__nvidiactl="",
            dev__kfd="",
            proc__driver__nvidia__version=version,
        )
        pci = tmp_path / "sys/bus/pci/devices"
        tpu, network = pci / "0000:00:04.0", pci / "0000:00:05.0"
        for device, number in ((tpu, "0x0063"), (network, "0x0042")):
            device.mkdir(parents=True)
            (device / "vendor").write_text("0x1ae0\n")
            (device / "device").write_text(number + "\n")
        assert self.read(tmp_path).accelerators == [
            "2 NVIDIA GPUs (driver 550)",
            "1 Google TPU chip",
            "AMD GPU",
        ]


class TestAcceleratorProblems:
    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch):
        """No plugin is installed and nobody chose a platform."""
        monkeypatch.delenv("JAX_PLATFORMS")
        monkeypatch.setattr(diagnosis, "version", lambda _name: None)

    @pytest.mark.parametrize(
        ("seen", "remedy"),
        [
            ("1 NVIDIA GPU", "pip install 'jax[cuda13]'"),
            ("1 NVIDIA GPU (driver 580)", "pip install 'jax[cuda13]'"),
            ("1 NVIDIA GPU (driver 550)", "pip install 'jax[cuda12]'"),
            ("1 Google TPU chip", "pip install 'jax[tpu]'"),
            ("AMD GPU", "pip install 'jax[rocm7-local]'"),
        ],
    )
    def test_unused(self, seen, remedy):
        [problem] = accelerator_problems("cpu", [seen])
        assert problem == f"{seen} is here but JAX runs on cpu: {remedy}"
        # The remedy is an extra that this JAX has.
        extra = remedy.split("[")[1].split("]")[0]
        assert extra in importlib.metadata.metadata("jax").get_all("Provides-Extra")

    def test_a_plugin_that_did_not_start(self, monkeypatch):
        monkeypatch.setattr(diagnosis, "version", lambda _name: "0.12")
        [problem] = accelerator_problems("cpu", ["1 NVIDIA GPU (driver 580)"])
        assert "jax-cuda13-plugin are here but JAX runs on cpu" in problem

    def test_in_use_or_put_aside(self, monkeypatch):
        assert accelerator_problems("gpu", ["1 NVIDIA GPU"]) == []
        assert accelerator_problems("tpu", ["4 Google TPU chips"]) == []
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        assert accelerator_problems("cpu", ["1 NVIDIA GPU"]) == []


class TestRequirements:
    def test_extras_and_versions(self, monkeypatch):
        metadata = types.SimpleNamespace(get_all=lambda _key: ["gpu", "parquet"])
        requires = [
            "numpy>=2",
            "optax>=99",
            "absent-library",
            "never; python_version < '3'",
            "pyarrow>=20; extra == 'parquet'",
            "also-absent>=1; extra == 'gpu'",
        ]
        versions = {"numpy": "2.4", "optax": "0.2.8", "pyarrow": "21.0"}

        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "metadata", lambda _name: metadata)
        monkeypatch.setattr(importlib.metadata, "requires", lambda _name: requires)
        monkeypatch.setattr(importlib.metadata, "version", version)
        always, extras = read_requirements("meshlm")
        assert [(one.requirement, one.satisfied) for one in always] == [
            ("numpy>=2", True),
            ("optax>=99", False),
            ("absent-library", False),
        ]
        assert {one.name: one.missing for one in extras} == {
            "gpu": ["also-absent>=1"],
            "parquet": [],
        }
        assert diagnosis._library_problems(always) == [
            "optax>=99 is needed, 0.2.8 is installed: pip install 'optax>=99'",
            "absent-library is needed, nothing is installed: pip install 'absent-library'",
        ]

    def test_an_extra_that_is_not_complete_says_how_to_get_it(self, here):
        library = installed.Library(
            name="pyarrow", requirement="pyarrow>=20", installed=None, satisfied=False
        )
        extra = installed.Extra(name="parquet", libraries=[library])
        text = render(dataclasses.replace(here, extras=[extra]))
        assert "missing pyarrow>=20: pip install 'meshlm[parquet]'" in text

    def test_not_installed_at_all(self):
        assert read_requirements("no-such-distribution") == ([], [])


class TestProblems:
    def test_jax_that_does_not_start(self, monkeypatch):
        def fail():
            raise RuntimeError("Unable to initialize backend 'tpu':\n  no driver")

        monkeypatch.setattr(diagnosis, "device_facts", fail)
        found = diagnose()
        assert found.devices is None
        assert found.checks == []
        assert found.problems == [
            "JAX does not start: RuntimeError: Unable to initialize backend 'tpu': no driver"
        ]
        assert "JAX does not start" in render(found)

    def test_little_disk(self, monkeypatch):
        usage = types.SimpleNamespace(free=GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        [problem] = diagnose().problems
        assert problem.startswith("1.0 GiB are free here")

    def test_a_check_that_raises_is_a_problem(self):
        def fail():
            raise RuntimeError("device lost")

        found = checks._run("x", fail)
        assert (found.passed, found.detail) == (False, "RuntimeError: device lost")

    def test_the_matmul_check_sees_one_wrong_entry(self, monkeypatch):
        true_jit = jax.jit

        def broken(function):
            return lambda *args: true_jit(function)(*args).at[3, 4].add(1)

        monkeypatch.setattr(jax, "jit", broken)
        assert checks._check_matmul("float32") == "1 of 9216 entries differ from numpy's"


@pytest.mark.skipif(not core_platform.needed_flags(), reason="this JAX needs no flag")
def test_the_known_fault_is_found_without_the_flag():
    program = "from meshlm.doctor.checks import run_checks; print(run_checks()[2].detail)"
    # A value of the user's own wins over MeshLM's; this one brings the wrong fusions back.
    flag = f"{core_platform.needed_flags()[0].name}=dot,reduce"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flag},
    )
    assert "instead of 1073741824" in done.stdout, done.stderr
