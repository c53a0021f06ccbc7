"""Two hosts, made of network namespaces, that train together: names, and a link that is cut.

It takes root, and `ip` and `unshare` of Linux; without them it is skipped, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshlm import checkpoint
from runs import SMALL
from teams import Team

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

HEARTBEAT_S = 10
STEPS = 2000
WIRE = "veth0"
ADDRESSES = ("10.213.7.1", "10.213.7.2")


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of the link."""

    name: str
    address: str
    hosts_file: Path

    @property
    def within(self) -> list[str]:
        """The command inside of which another runs on this host, under this host's name."""
        setup = f'hostname {self.name} && mount --bind {self.hosts_file} /etc/hosts && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "-u", "-m", "sh", "-c", setup, "sh"]

    def resolve(self, *names: str) -> None:
        """Makes these the names that the host knows, each as `NAME ADDRESS`."""
        lines = [" ".join(reversed(name.split())) for name in names]
        self.hosts_file.write_text("\n".join([*lines, ""]))

    def ip(self, *words: str) -> None:
        run("ip", "-n", self.name, *words)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces take root, ip and unshare")
    names = [f"meshlm-{os.getpid()}-{side}" for side in "ab"]
    files = [tmp_path / f"hosts-{side}" for side in "ab"]
    made = [Host(*three) for three in zip(names, ADDRESSES, files, strict=True)]
    for host in made:
        host.resolve("localhost 127.0.0.1", *map(" ".join, zip(names, ADDRESSES, strict=True)))
    try:
        try:
            for host in made:
                run("ip", "netns", "add", host.name)
            first, second = made
            ends = ("type", "veth", "peer", "name", WIRE, "netns", second.name)
            first.ip("link", "add", WIRE, *ends)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for host in made:
            host.ip("addr", "add", f"{host.address}/24", "dev", WIRE)
            host.ip("link", "set", WIRE, "up")
            host.ip("link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(("ip", "netns", "del", host.name), capture_output=True)


def test_a_cut_link_ends_both(hosts, store, compiled, tmp_path):
    folder = tmp_path / "run"
    options = ("--steps", str(STEPS), "--checkpoint-every", "5", "--mesh.data", "2")
    options = (*options, "--heartbeat-timeout-s", str(HEARTBEAT_S))
    command = ("train", *SMALL, "--data", store, "--run", folder, *options)
    within = [host.within for host in hosts]
    team = Team(tmp_path / "team", command, env=compiled, host=ADDRESSES[0], within=within)
    try:
        team.wait_for_step(folder, 20)
        hosts[1].ip("link", "set", WIRE, "down")
        cut_s = time.monotonic()
        first, second = team.wait(timeout_s=HEARTBEAT_S + 90)
    finally:
        team.kill()
    for process in (first, second):
        assert process.code == 1, process
        assert process.at_s - cut_s < HEARTBEAT_S + 30
        assert "run the same command again" in process.said
        assert "Traceback" not in process.err
    assert "process 1 " in first.said
    assert "process 0 is gone" in second.said
    steps = checkpoint.complete_steps(folder / "checkpoints")
    assert steps
    assert checkpoint.verify(folder / "checkpoints" / f"step_{steps[-1]}") == []


def test_process_0_need_not_know_its_own_name(hosts, store, compiled, tmp_path):
    first, second = hosts
    second.resolve(f"{second.name} {second.address}", f"process-0 {first.address}")
    command = ("train", *SMALL, "--data", store, "--run", tmp_path / "run", "--steps", "2")
    within = [host.within for host in hosts]
    team = Team(
        tmp_path / "team",
        (*command, "--mesh.data", "2"),
        env=compiled,
        host="process-0",
        within=within,
    )
    try:
        ended = team.wait()
    finally:
        team.kill()
    assert [process.code for process in ended] == [0, 0], ended


def test_names_that_lead_nowhere_are_said(hosts, store, compiled, tmp_path):
    """Nobody knows the one; the other is each machine itself, as a machine's own is on Debian."""
    for host in hosts:
        host.resolve(f"{host.name} 127.0.1.1", "debian 127.0.1.1")
    command = ("train", *SMALL, "--data", store, "--run", tmp_path / "run")
    within = [host.within for host in hosts]
    for name, here, there in (
        ("node0.invalid", "on this machine too the name node0.invalid does not resolve", None),
        ("debian", "here debian is 127.0.1.1, which is each machine itself", "127.0.1.1: conn"),
    ):
        options = (*command, "--mesh.data", "2", "--join-timeout-s", "12")
        team = Team(tmp_path / name, options, env=compiled, host=name, within=within)
        try:
            ended = team.wait()
        finally:
            team.kill()
        assert [process.code for process in ended] == [1, 1]
        said = here, there or "the name node0.invalid does not resolve"
        for process, reason in zip(ended, said, strict=True):
            waits, last = process.err.splitlines()
            assert " waits " in waits
            assert reason in waits
            assert reason in last
        assert not (tmp_path / "run").exists()


def test_an_own_name_that_other_machines_do_not_reach_is_said(hosts, store, compiled, tmp_path):
    """Debian has a machine's own name at 127.0.1.1, and gloo tells the other machines that."""
    for host in hosts:
        host.resolve(f"{host.name} 127.0.1.1")
    command = ("train", *SMALL, "--data", store, "--run", tmp_path / "run", "--steps", "2")
    options = (*command, "--mesh.data", "2", "--heartbeat-timeout-s", str(HEARTBEAT_S))
    within = [host.within for host in hosts]
    team = Team(tmp_path / "team", options, env=compiled, host=ADDRESSES[0], within=within)
    try:
        ended = team.wait()
    finally:
        team.kill()
    for host, process in zip(hosts, ended, strict=True):
        assert process.code == 1
        assert f"this machine's name {host.name} is 127.0.1.1 in /etc/hosts" in process.err
