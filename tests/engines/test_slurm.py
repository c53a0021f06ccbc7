"""launch/train-slurm.sh on a real SLURM: a controller and two nodes, all on this machine.

It takes root (the nodes get names of their own in /etc/hosts, in a mount namespace), and Debian's
slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from programs import LAUNCH, Program, end_all, environment, eventually, find, need
from runs import lines
from teams import free_port

pytestmark = pytest.mark.timeout(400)

CONFIG = """
ClusterName=meshlm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
NodeName=meshlm-a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=meshlm-b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """SLURM's daemons in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: dict[str, Program] = {}
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.env["PATH"] += ":/usr/sbin"
        host = socket.gethostname().partition(".")[0]
        ports = [free_port() for _ in range(3)]
        text = CONFIG.format(folder=folder, host=host, ports=ports)
        (folder / "slurm.conf").write_text(text)
        for name in ("state", "spool-meshlm-a", "spool-meshlm-b"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        hosts = "127.0.0.1 localhost meshlm-a meshlm-b " + host
        (folder / "hosts").write_text(hosts + "\n")

    def start(self) -> None:
        """Starts the daemons, and returns when both nodes are idle."""
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "key-file": "munge.key"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        # Its folder is only this user's, and another one's socket would be refused.
        self._start("munged", "munged", "--foreground", "--force", *options)
        eventually((self.folder / "munge.socket").exists, 20, self._logs)
        self._start("slurmctld", "slurmctld", "-D")
        for node in ("meshlm-a", "meshlm-b"):
            self._start(node, "slurmd", "-D", "-N", node)
        eventually(
            lambda: self.run("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 60, self._logs
        )

    def _start(self, name: str, *command: str) -> None:
        within = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        words = ["unshare", "--mount", "sh", "-c", within, "sh", *command]
        self.programs[name] = Program(words, self.folder / f"{name}.log", self.env)

    def _logs(self) -> str:
        return "\n".join(f"{name}: {p.text[-800:]}" for name, p in self.programs.items())

    def run(self, *command: str) -> str:
        """Returns what one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """Returns what SLURM knows of a job."""
        text = self.run("scontrol", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def tasks(self) -> list[psutil.Process]:
        """Returns the processes of `meshlm train` that run in jobs."""
        found = [p for p in find("train", "--preset=test") if "srun" not in p.cmdline()]
        return sorted(found, key=lambda p: p.environ()["SLURM_PROCID"])

    def end(self) -> None:
        """Ends the daemons and all that they run."""
        for name in ("slurmctld", "meshlm-a", "meshlm-b", "munged"):
            if name in self.programs:
                self.programs[name].end()
        # They are nobody's children, so that jobs live on without their node's daemon.
        end_all([p for p in psutil.Process().children() if p.name().startswith("slurmstepd")])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    if os.geteuid() != 0:
        pytest.skip("SLURM's nodes get their names in a mount namespace: that takes root")
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespaces here: {tried.stderr.strip()}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


def submit(cluster: Cluster, folder: Path, store: Path, steps: int, *more: str) -> str:
    """Submits the template, filled in for two nodes of one processor; returns the job's number."""
    text = (LAUNCH / "train-slurm.sh").read_text()
    options = [f"--steps={steps}", "--seq-len=32", "--checkpoint-every=10", "--sample-every=0"]
    for old, new in (
        ("<environment>/bin", str(Path(sys.executable).parent)),
        ("<shared folder>/runs/first", str(folder / "run")),
        ("<shared folder>/store", str(store)),
        ("--preset=gpt-j-6b", "--preset=test"),
        ("--batch-size=64", "--batch-size=8"),
        ("--mesh.data=16", " ".join(["--mesh.data=2", *options, *more])),
        ("--ntasks-per-node=8", "--ntasks-per-node=1"),
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("#SBATCH --gpus-per-node=8\n", ""),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (folder / "job.sh").write_text(text)
    words = ("sbatch", "--parsable", f"--chdir={folder}", str(folder / "job.sh"))
    number = cluster.run(*words).strip()
    assert number.isdigit(), number
    return number


def wait(cluster: Cluster, number: str, folder: Path, state: str, timeout_s: float = 150) -> dict:
    """Returns what SLURM knows of a job that has come to a state."""

    def look() -> dict[str, str]:
        job = cluster.job(number)
        # One that goes back into the queue waits two minutes there, so that a node may recover.
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
            cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        return job if job["JobState"] == state else {}

    log = folder / f"meshlm-{number}.log"
    return eventually(
        look, timeout_s, lambda: f"{cluster.job(number)}\n{log.read_text() if log.exists() else ''}"
    )


def has_trained(cluster: Cluster, folder: Path, step: int) -> None:
    """Returns when a run has written a step's line."""
    path = folder / "run" / "metrics.jsonl"
    eventually(lambda: path.exists() and f'"step": {step},' in path.read_text(), 150)


def test_it_trains_stops_with_a_saved_step_and_goes_on(cluster, store, tmp_path):
    number = submit(cluster, tmp_path, store, 300)
    has_trained(cluster, tmp_path, 20)
    # As before the time limit: SIGTERM to every task; the script then sees exit code 75.
    cluster.run("scancel", "--signal=TERM", number)
    eventually(lambda: cluster.job(number)["Restarts"] == "1", 90)
    # As an operator, or SLURM after a node has failed: without a word with the script.
    done = len(lines(tmp_path / "run"))
    assert 20 <= done < 300
    wait(cluster, number, tmp_path, "RUNNING")
    has_trained(cluster, tmp_path, done + 10)
    cluster.run("scontrol", "requeue", number)
    eventually(lambda: cluster.job(number)["Restarts"] == "2", 90)
    job = wait(cluster, number, tmp_path, "COMPLETED")
    assert job["ExitCode"] == "0:0"
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 301))
    assert "2 processes x 1 devices = 2" in (tmp_path / "run" / "log.txt").read_text()


def test_a_mistake_ends_the_job_with_its_code(cluster, store, tmp_path):
    number = submit(cluster, tmp_path, store, 5, "--learning-rate=-1")
    assert wait(cluster, number, tmp_path, "FAILED")["ExitCode"] == "2:0"
    assert cluster.job(number)["Restarts"] == "0"


def test_a_process_that_is_killed_ends_the_job_with_its_code(cluster, store, tmp_path):
    number = submit(cluster, tmp_path, store, 3000)
    has_trained(cluster, tmp_path, 5)
    first, second = cluster.tasks()
    assert (first.environ()["SLURM_PROCID"], second.environ()["SLURM_PROCID"]) == ("0", "1")
    second.send_signal(signal.SIGKILL)
    # The worst of 137, of the one that was killed, and 1, of the other.
    assert wait(cluster, number, tmp_path, "FAILED")["ExitCode"] == "137:0"
    assert cluster.job(number)["Restarts"] == "0"
    log = (tmp_path / f"meshlm-{number}.log").read_text()
    assert "run the same command again to go on from the last checkpoint" in log
