"""`meshlm train` as several real processes: the same numbers, and an end for all when one ends.

They exchange through gloo on this machine. Marked `long` is what only repeats on more of them, or
waits on purpose.
"""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from meshlm import checkpoint
from runs import SMALL, assert_same_run, lines, wait_for_step
from teams import Team

pytestmark = pytest.mark.timeout(900)

STEPS = 12
HEARTBEAT_S = 10
EXACT = ("--compute-dtype", "float32")
# Measuring at each step makes a step long enough to be hit in the middle of the run.
SLOWLY = ("--eval-every", "1", "--eval-tokens", "4096", "--checkpoint-every", "3")
NUMBERS = ("loss", "grad_norm", "val_loss", "val_bits_per_byte")
TOLERANCE = 1e-5
# What gloo prints, a part at a time: the parts of its threads' lines mix.
GLOO = re.compile(
    r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. |"
    r"Expected number of connected peer ranks is : |\n"
)


@pytest.fixture
def team(tmp_path, compiled):
    """Starts teams, with a shared compile cache; none outlives the test."""
    teams = []

    def start(*arguments, **options) -> Team:
        options["env"] = {**compiled, **options.get("env", {})}
        teams.append(Team(tmp_path / f"team-{len(teams)}", arguments, **options))
        return teams[-1]

    yield start
    for started in teams:
        started.kill()


def train(store: Path, run: Path, *options: str | Path) -> tuple[str | Path, ...]:
    return ("train", *SMALL, "--data", store, "--run", run, "--steps", str(STEPS), *options)


def mesh(replica: int = 1, data: int = 1, model: int = 1) -> tuple[str, ...]:
    sizes = {"replica": replica, "data": data, "model": model}
    return tuple(word for axis, n in sizes.items() for word in (f"--mesh.{axis}", str(n)))


def assert_close(run: Path, other: Path) -> None:
    found, wanted = lines(run), lines(other)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for one, two in zip(found, wanted, strict=True):
        for name in NUMBERS:
            if name in one and name in two:
                assert one[name] == pytest.approx(two[name], rel=TOLERANCE), (one["step"], name)
    assert any("val_loss" in line for line in found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store, compiled):
    """The run of one process on one device."""
    from conftest import CommandLine

    folder = tmp_path_factory.mktemp("alone")
    options = train(store, folder / "run", *EXACT, "--eval-every", "6")
    done = CommandLine(folder)(*options, env=compiled)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store, compiled):
    """The run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = train(store, folder / "run", *SLOWLY, *mesh(data=2))
    ended = Team(folder / "team", options, env=compiled).wait()
    assert [process.code for process in ended] == [0, 0], ended
    return folder / "run"


def test_two_processes_train_as_one_does(team, store, tmp_path, alone):
    run = tmp_path / "run"
    sampled = ("--sample-every", "6", "--sample-tokens", "4", "--eval-every", "6")
    started = team(*train(store, run, *EXACT, *sampled, *mesh(data=4)), devices=2, reads=True)
    first, second = started.wait()
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert_close(run, alone)
    assert "2 processes x 2 devices = 4" in first.out
    assert "8 sequences a step = 4 shares of the batch x 1 part(s) x 2" in first.out
    assert re.search(r"self-test: a sum over all 4 devices is right and took [\d.]+ ms", first.out)
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step_12.json", "step_6.json"]
    # One writes and speaks; JAX's own words aside, the other is silent.
    assert GLOO.sub("", second.out) == ""
    assert without_waits(second.err) == ""
    assert_each_reads_its_own(started.folder)
    # Medians: one step on a busy machine may wait for the processor, and not for data.
    waited_s, step_s = (
        sorted(line[name] for line in lines(run)[2:]) for name in ("data_wait_s", "step_s")
    )
    assert waited_s[len(waited_s) // 2] < 0.01 * step_s[len(step_s) // 2]


def without_waits(err: str) -> str:
    """What stands there also on a machine that is not too busy: nobody was waited for for long."""
    return re.sub(r"^.* waits (for|at) .*\n", "", err, flags=re.MULTILINE)


def assert_each_reads_its_own(folder: Path) -> None:
    reads = [(folder / f"reads-{n}").read_text().split("\n")[:-1] for n in range(2)]
    for split in ("train", "val"):
        first, second = ([r for r in read if r.startswith(split)] for read in reads)
        assert first
        assert second
        assert set(first).isdisjoint(second), split
    # Four of each batch's eight rows; what is read ahead of the last step is bounded.
    trained = [r for r in reads[1] if r.startswith("train")]
    assert 4 * STEPS <= len(trained) <= 4 * (STEPS + 40)


@pytest.mark.parametrize(
    ("count", "devices", "axes"),
    [(4, 1, {"data": 4}), (2, 2, {"data": 2, "model": 2}), (2, 2, {"replica": 2, "model": 2})],
)
@pytest.mark.long
def test_other_teams_train_as_one_does(team, store, tmp_path, alone, count, devices, axes):
    run = tmp_path / "run"
    options = train(store, run, *EXACT, "--eval-every", "6", *mesh(**axes))
    ended = team(*options, count=count, devices=devices).wait()
    assert [process.code for process in ended] == [0] * count, ended
    assert_close(run, alone)


@pytest.mark.long
def test_a_run_goes_on_in_other_teams(team, cli, compiled, store, tmp_path, alone):
    """Written by four and read by one, and the other way: the same data, losses to tolerance."""
    run = tmp_path / "run"
    go_on = ("train", "--run", run, "--sample-every", "0", "--eval-every", "6")
    begin = ("train", *SMALL, "--data", store, "--run", run, *EXACT, "--eval-every", "6")
    planned = ("--steps", str(STEPS), "--checkpoint-every", "4")
    four = team(*begin, *planned, *mesh(data=4), count=4)
    four.wait_for_step(run, 4)
    four.send(2, signal.SIGTERM)
    stopped = four.wait()
    assert {process.code for process in stopped} == {75}, stopped
    after_four = lines(run)[-1]["step"]
    # One process alone, two more steps at least.
    one = cli.start(*go_on, *planned, env=compiled)
    wait_for_step(run, after_four + 1, one)
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=120)
    assert one.returncode in (0, 75)
    if one.returncode == 75:
        ended = team(*go_on, *planned, *mesh(data=2, model=2), count=2, devices=2).wait()
        assert [process.code for process in ended] == [0, 0], ended
    assert_close(run, alone)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_one_is_killed_and_the_other_ends(team, store, tmp_path, undisturbed, victim):
    run = tmp_path / "run"
    options = train(store, run, *SLOWLY, *mesh(data=2), "--heartbeat-timeout-s", str(HEARTBEAT_S))
    started = team(*options)
    started.wait_for_step(run, 5)
    killed_s = started.send(victim, signal.SIGKILL)
    ended = started.wait(timeout_s=HEARTBEAT_S + 60)
    survivor = ended[1 - victim]
    assert ended[victim].code == -signal.SIGKILL
    assert survivor.code == 1, survivor
    assert survivor.at_s - killed_s < HEARTBEAT_S + 30
    assert f"process {victim} " in survivor.said
    assert "run the same command again" in survivor.said
    assert "Traceback" not in survivor.err
    # What was saved is there, and the same command goes on from it.
    assert checkpoint.complete_steps(run / "checkpoints") != []
    again = team(*options).wait()
    assert [process.code for process in again] == [0, 0], again
    assert "resumed from" in again[0].out
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.parametrize("told", [1, pytest.param(0, marks=pytest.mark.long)])
def test_one_is_told_to_stop_and_both_save(team, store, tmp_path, undisturbed, told):
    run = tmp_path / "run"
    options = train(store, run, *SLOWLY, *mesh(data=2))
    started = team(*options)
    started.wait_for_step(run, 4)
    started.send(told, signal.SIGTERM)
    first, second = started.wait()
    assert (first.code, second.code) == (75, 75), first.err + second.err
    step = lines(run)[-1]["step"]
    assert step < STEPS
    for process in (first, second):
        assert f"after step {step}" in process.said
    assert checkpoint.complete_steps(run / "checkpoints")[-1] == step
    again = team(*options).wait()
    assert [process.code for process in again] == [0, 0], again
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.long
def test_a_slow_process_is_waited_for(team, store, tmp_path, undisturbed):
    run = tmp_path / "run"
    started = team(*train(store, run, *SLOWLY, *mesh(data=2)))
    started.wait_for_step(run, 4)
    started.send(1, signal.SIGSTOP)
    time.sleep(20)
    assert all(process.poll() is None for process in started.running.values())
    started.send(1, signal.SIGCONT)
    assert [process.code for process in started.wait()] == [0, 0]
    assert_same_run(run, undisturbed, STEPS)


def test_who_is_missing_is_named(team, store, tmp_path):
    options = train(store, tmp_path / "run", *mesh(data=3), "--join-timeout-s", "8")
    first, third = team(*options, count=3, absent=[1]).wait(timeout_s=90)
    assert (first.code, third.code) == (1, 1)
    for process in (first, third):
        assert "1 of 3 processes did not come within 8 s; missing: 1" in process.said
        assert without_waits(process.err).count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_all_with_its_code(team, store, tmp_path):
    """Told by both: a mesh without process 1. Told at once: a port that is taken."""
    run = tmp_path / "run"
    ended = team(*train(store, run, *mesh(data=1))).wait()
    assert [process.code for process in ended] == [2, 2]
    assert all("are none of process 1: raise --mesh.*" in process.said for process in ended)
    assert not run.exists()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began_s = time.monotonic()
        (first,) = team(*train(store, run, *mesh(data=2)), port=port, absent=[1]).wait()
    assert first.code == 4
    assert f"port {port} cannot be had on this machine" in first.said
    assert first.at_s - began_s < 60  # most of it is Python's and JAX's own start


@pytest.mark.parametrize(
    ("where", "point"),
    [
        (0, "before-arrays"),
        pytest.param(1, "before-arrays", marks=pytest.mark.long),
        pytest.param(0, "before-manifest", marks=pytest.mark.long),
    ],
)
def test_a_save_that_fails_in_one_is_known_to_both(
    team, store, tmp_path, undisturbed, where, point
):
    """One cannot begin, or commit, any save; the run goes on to its end, and the next is good."""
    run = tmp_path / "run"
    options = train(store, run, *SLOWLY, *mesh(data=2))
    broken = {where: {"MESHLM_FAILPOINT": f"{point}:error"}}
    ended = team(*options, env_of=broken).wait()
    assert [process.code for process in ended] == [1, 1], ended
    said, heard = ended[where].said, ended[1 - where].said
    lost = "checkpoint of step 12 was not saved: "
    assert said.startswith(f"{lost}[Errno 28]")
    if point == "before-arrays":
        assert heard.startswith(f"{lost}process {where}: OSError: [Errno 28]")
    else:
        assert heard == f"in another process, {said}"
    assert len(lines(run)) == STEPS
    assert checkpoint.complete_steps(run / "checkpoints") == []
    again = team(*options).wait()
    assert [process.code for process in again] == [0, 0], again
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.long
def test_a_process_that_cannot_write_its_part_holds_nobody_up(team, store, tmp_path, undisturbed):
    """Orbax would wait for that part for hours; training goes on without it."""
    run = tmp_path / "run"
    options = train(store, run, *mesh(data=2), "--checkpoint-every", "6")
    uncached = {1: {"JAX_COMPILATION_CACHE_DIR": ""}}
    ended = team(*options, env_of=uncached, small_files_of=1).wait()
    assert [process.code for process in ended] == [1, 1], ended
    assert len(lines(run)) == STEPS
    assert "in another process, checkpoint of step 6 was not saved" in ended[0].out
    assert "checkpoint of step 12 was not saved" in ended[0].said
    assert checkpoint.complete_steps(run / "checkpoints") == []
    again = team(*options).wait()
    assert [process.code for process in again] == [0, 0], again
    for one, two in zip(lines(run), lines(undisturbed), strict=True):
        assert one["loss"] == two["loss"]


def test_launch_local(cli, compiled, store, tmp_path, alone):
    run = tmp_path / "run"
    options = train(store, run, *EXACT, "--eval-every", "6", *mesh(data=4))
    words = ("launch", "local", "-n", "2", "--devices", "2", "--", *options)
    done = cli(*words, env=compiled)
    assert done.returncode == 0, done.stderr
    assert_close(run, alone)
    assert all(line.startswith("[0] ") for line in done.stdout.splitlines())
