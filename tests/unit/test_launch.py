"""The templates for servers and for training on many machines: what they name is there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from meshlm.core import place
from meshlm.core.errors import BadInputError, BusyError, UsageError
from meshlm.serving.config import Limits
from meshlm.serving.metrics import FINISHED, REJECTED, Metrics

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
PAGE = (ROOT / "docs" / "serving-operations.md").read_text()
FLAGS = (ROOT / "tests" / "golden" / "flags" / "serve.txt").read_text()
OPTIONS = set(re.findall(r"^(--[\w.-]+)", FLAGS, re.MULTILINE))
TEMPLATES = ("kubernetes-serve.yaml", "ray_serve.py", "nginx.conf", "Caddyfile")


@pytest.mark.parametrize("name", TEMPLATES)
def test_options_in_a_template_exist(name):
    text = (LAUNCH / name).read_text()
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z]+)?", text)) - {"--from-file"}
    assert used
    assert used <= OPTIONS
    assert name in PAGE


def test_the_kubernetes_template():
    documents = yaml.safe_load_all((LAUNCH / "kubernetes-serve.yaml").read_text())
    deployment, service, policy = documents
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    arguments = dict(argument.partition("=")[::2] for argument in container["args"])
    assert float(arguments["--drain-s"]) < pod["spec"]["terminationGracePeriodSeconds"]
    assert arguments["--host"] == "0.0.0.0"
    port = {p["name"]: p["containerPort"] for p in container["ports"]}["http"]
    assert int(arguments["--port"]) == port
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in PROBES}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["spec"]["volumes"]}
    for option in ("--api-key-file", "--compile-cache"):
        assert str(Path(arguments[option]).parent) in mounts
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels


PROBES = ("startup", "readiness", "liveness")


# Ray itself runs the templates in tests/engines; here is what can be seen without it.


def test_the_ray_template_imports_what_ray_and_meshlm_install():
    tree = ast.parse((LAUNCH / "ray_serve.py").read_text())
    named = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    foreign = {name.partition(".")[0] for name in named if name} - sys.stdlib_module_names
    # ray[serve] asks for aiohttp, which asks for yarl, and for starlette.
    assert foreign == {"ray", "aiohttp", "yarl", "starlette"}


def test_what_the_ray_template_pickles_is_there_by_then():
    """Ray pickles a deployment's class by value as soon as it is decorated."""
    tree = ast.parse((LAUNCH / "ray_serve.py").read_text())
    names = [getattr(node, "name", "") for node in tree.body]
    below = set(names[names.index("Replica") + 1 :])
    replica = tree.body[names.index("Replica")]
    assert not {n.id for n in ast.walk(replica) if isinstance(n, ast.Name)} & below


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_the_proxies_templates_are_balanced(name):
    text = re.sub(r"#.*", "", (LAUNCH / name).read_text())
    assert text.count("{") == text.count("}") > 3
    if name == "nginx.conf":
        assert all(re.search(r"[;{}]$", line.strip()) for line in text.splitlines() if line.strip())
        assert Limits().max_body_bytes == 2 << 20
        assert "client_max_body_size 2m;" in text


def test_the_page_has_every_option():
    named = set(re.findall(r"`(--[a-z][\w.-]*)", PAGE))
    assert named == OPTIONS | {"--api-key"}


def test_the_page_has_every_metric():
    rendered = Metrics().render().decode()
    names = set(re.findall(r"^# TYPE (meshlm_\w+) ", rendered, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    told = set(re.findall(r"`(meshlm_\w+)", PAGE))
    assert told == names
    for reason in (*FINISHED, *REJECTED):
        assert f"`{reason}`" in PAGE


# Training on many machines.

TRAIN_FLAGS = (ROOT / "tests" / "golden" / "flags" / "train.txt").read_text()
TRAIN_OPTIONS = set(re.findall(r"^(--[\w.-]+)", TRAIN_FLAGS, re.MULTILINE))
TRAIN_TEMPLATES = (
    "train-slurm.sh",
    "train-jobset.yaml",
    "train-cloud-tpu.sh",
    "train-skypilot.yaml",
    "train-hosts.sh",
    "train_ray.py",
)
VARIABLES = {place._ADDRESS, place._COUNT, place._NUMBER}
# The exit codes that a restart cannot better, and that of a run that was told to stop.
HOPELESS = {UsageError.exit_code, BadInputError.exit_code}
STOPPED = 75


def options_of_training(text: str) -> set[str]:
    """Every option that stands with `meshlm train`: those with `=` or with a dot."""
    return set(re.findall(r"(?<![\w-])(--[a-z][\w-]*(?:\.[a-z]+)?)=[^\s\"]", text))


@pytest.mark.parametrize("name", TRAIN_TEMPLATES)
def test_options_of_training_in_a_template_exist(name):
    text = (LAUNCH / name).read_text()
    # Those of the scheduler's own commands.
    foreign = {"--cluster", "--workload", "--tpu-type", "--docker-image", "--max-restarts"}
    foreign |= {"--command", "--zone", "--worker", "--kill-on-bad-exit", "--wait"}
    foreign |= set(re.findall(r"^#SBATCH (--[\w-]+)", text, re.MULTILINE))
    assert f"`{name}`" in (ROOT / "docs" / "many-machines.md").read_text()
    used = options_of_training(text) - foreign
    assert {"--run", "--data", "--batch-size", "--mesh.data"} <= used
    assert used <= TRAIN_OPTIONS


@pytest.mark.parametrize("name", [n for n in TRAIN_TEMPLATES if n.endswith(".sh")])
def test_the_scripts_are_bash(name):
    assert os.access(LAUNCH / name, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", ["train-jobset.yaml", "train-skypilot.yaml", "train-hosts.sh"])
def test_processes_are_told_where_they_are(name):
    text = (LAUNCH / name).read_text()
    assert set(re.findall(r"JAX_[A-Z_]*[A-Z]", text)) == VARIABLES
    # Only in words: JAX reads these schedulers' own variables.
    for other in ("train-slurm.sh", "train-cloud-tpu.sh"):
        assert "JAX_" not in (LAUNCH / other).read_text()


def test_the_jobset():
    jobset, policy = yaml.safe_load_all((LAUNCH / "train-jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {v["name"]: v for v in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["completions"])
    # <jobset>-<job>-<index of the job>-<index of the pod>.<subdomain>
    name = jobset["metadata"]["name"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    subdomain = jobset["spec"]["network"]["subdomain"]
    assert host == f"{name}-{replicated['name']}-0-0.{subdomain}"
    assert int(port) == container["ports"][0]["containerPort"]
    # A pod that ends makes all start again, but for what would come again.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert set(rule["onExitCodes"]["values"]) == HOPELESS
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 1
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    labels = job["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels


def test_the_skypilot_task():
    text = (LAUNCH / "train-skypilot.yaml").read_text()
    task = yaml.safe_load(text)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED]
    told = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NODE_RANK": "1"}
    told |= {"SKYPILOT_NUM_NODES": "2", "PATH": os.environ["PATH"]}
    run = task["run"].partition("exec meshlm")[0] + "env"
    found = subprocess.run(
        ["bash", "-c", run], env=told, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476" in found
    assert "JAX_NUM_PROCESSES=2" in found
    assert "JAX_PROCESS_ID=1" in found


def test_the_slurm_job(tmp_path):
    """The end of a job, with a `srun` and a `scontrol` that only say that they were called."""
    text = (LAUNCH / "train-slurm.sh").read_text()
    for line in ("--requeue", "--signal=TERM@300", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    # The first task that has saved must not end those that save.
    assert "srun --kill-on-bad-exit=0 --wait=120 " in text
    for name, code in (("srun", '"exit $CODE"'), ("scontrol", '"echo $@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\neval {code}\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "job.sh"
    # The names to fill in are no shell.
    script.write_text(text.replace("<", "").replace(">", "").replace("shared folder", "shared"))

    def end(code: int, restarts: int = 0) -> tuple[int, str]:
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
        variables |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
        ran = subprocess.run(["bash", script], env=variables, capture_output=True, text=True)
        return ran.returncode, ran.stdout.strip()

    assert end(0) == (0, "")
    assert end(STOPPED) == (STOPPED, "requeue 7")
    assert end(STOPPED, restarts=100) == (STOPPED, "")
    assert end(1) == (1, "")


# A host is a shell here, and `meshlm` tells what it was given.
FAKE_SSH = """#!/bin/sh
shift
exec sh -c "$1"
"""
# (A handler in Python is not run while the call sleeps that follows just after the signal.)
FAKE_MESHLM = r"""#!{python}
import os, signal, sys
me = int(os.environ["JAX_PROCESS_ID"])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
address, count = os.environ["JAX_COORDINATOR_ADDRESS"], os.environ["JAX_NUM_PROCESSES"]
os.write(1, " ".join(["began", str(me), address, count, *sys.argv[1:]]).encode() + b"\n")
if "--wait" in sys.argv and signal.sigtimedwait([signal.SIGTERM], 60):
    os.write(1, f"saved {{me}}\n".encode())
    sys.exit(75)
sys.exit(3 * me)
"""


@pytest.fixture
def hosts(tmp_path):
    """Starts the script for hosts, with the two fakes."""
    for name, text in (("ssh", FAKE_SSH), ("meshlm", FAKE_MESHLM.format(python=sys.executable))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started = []

    def start(*options: str) -> subprocess.Popen[str]:
        variables = {"SSH": str(tmp_path / "ssh"), "MESHLM": shlex.quote(str(tmp_path / "meshlm"))}
        process = subprocess.Popen(
            [LAUNCH / "train-hosts.sh", "one,two,three", *options],
            env=os.environ | variables | {"PORT": "4711"},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_hosts_get_their_numbers_and_the_options_as_they_were(hosts):
    process = hosts("--sample-prompts", "it's $HOME and", '"two"')
    lines = process.communicate(timeout=30)[0].splitlines()
    words = 'one:4711 3 train --sample-prompts it\'s $HOME and "two"'
    assert sorted(lines) == [f"began {number} {words}" for number in range(3)]
    assert process.returncode == 6  # the worst of 0, 3 and 6


def test_hosts_stop_when_the_script_is_told_to(hosts):
    process = hosts("--wait")
    for _ in range(3):
        assert process.stdout.readline().startswith("began")
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=30)[0].splitlines()
    assert sorted(lines) == ["saved 0", "saved 1", "saved 2"]
    assert process.returncode == STOPPED
    assert time.monotonic() - began_s < 20


def test_the_exit_code_is_the_hosts_and_not_the_signals(hosts):
    """Also where it is told to stop just as the hosts end by themselves, and again and again."""
    for _ in range(10):
        process = hosts("--steps=1")
        for _ in range(3):
            assert process.stdout.readline().startswith("began")
        for _ in range(5):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
        assert process.wait(20) == 6


def test_hosts_stop_when_the_script_is_gone(hosts):
    process = hosts("--wait")
    for _ in range(3):
        assert process.stdout.readline().startswith("began")
    process.kill()
    assert sorted(process.stdout.read().splitlines()) == ["saved 0", "saved 1", "saved 2"]


def test_the_ray_template_for_training():
    tree = ast.parse((LAUNCH / "train_ray.py").read_text())
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert set(constants["NO_USE_TO_TRY_AGAIN"]) == HOPELESS
    assert BusyError.exit_code not in HOPELESS  # the last start may not have ended yet
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert words >= VARIABLES
