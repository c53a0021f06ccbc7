"""`meshlm train`: what a run leaves, and that nothing that ends it early can change it.

Processes are real where the end of one is the point; elsewhere the command runs in this process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshlm import checkpoint
from meshlm.checkpoint import Checkpointer, disk
from meshlm.training import loop
from runs import SMALL, arrays, assert_same_run, lines, one_line, repeatable, wait_for_step

pytestmark = pytest.mark.timeout(600)

STEPS = 20
KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "step_s",
    "data_wait_s",
    "mfu",
    "grad_noise_scale",
    "skipped",
}
VAL_KEYS = {"val_loss", "val_perplexity", "val_bits_per_byte"}
# Measuring at each step makes a step long enough to be hit in the middle of the run.
SLOWLY = ("--eval-every", "1", "--eval-tokens", "8192", "--checkpoint-every", "3")
VARIANTS = {
    "plain": (),
    "accumulated": (
        *("--accumulate", "2", "--document-mask", "--compute-dtype", "float32"),
        *("--skip-spikes", "6"),
    ),
}


BOTH = pytest.mark.parametrize("straight", VARIANTS, indirect=True)
QUICKLY_PLAIN = pytest.mark.parametrize(
    "straight", ["plain", pytest.param("accumulated", marks=pytest.mark.long)], indirect=True
)


@pytest.fixture(scope="module")
def straight(request, tmp_path_factory, store, compiled) -> tuple[tuple[str, ...], Path]:
    """The options of a run, and the run that nothing disturbed."""
    from conftest import CommandLine

    folder = tmp_path_factory.mktemp("straight")
    options = ("train", *SMALL, "--data", str(store), "--steps", str(STEPS), *SLOWLY)
    options = (*options, *VARIANTS[request.param])
    done = CommandLine(folder)(*options, "--run", folder / "run", env=compiled)
    assert done.returncode == 0, done.stderr
    return options, folder / "run"


@QUICKLY_PLAIN
def test_killed_and_run_again(straight, cli, compiled, tmp_path):
    options, undisturbed = straight
    run = tmp_path / "run"
    process = cli.start(*options, "--run", run, env=compiled)
    wait_for_step(run, STEPS // 2, process)
    process.kill()
    process.communicate()
    assert len(lines_whole(run)) < STEPS
    done = cli(*options, "--run", run, env=compiled)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(run, undisturbed, STEPS)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_store_that_is_cut_ends_the_run_and_keeps_its_save(cli, compiled, store, tmp_path):
    """One line and exit code 3, not SIGBUS."""
    run, data = tmp_path / "run", Path(shutil.copytree(store, tmp_path / "data"))
    options = ("train", *SMALL, "--data", data, "--run", run, "--checkpoint-every", "3")
    process = cli.start(*options, "--steps", "5000", env=compiled)
    wait_for_step(run, 4, process)
    (data / "train.tokens.bin").write_bytes(b"")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    told = one_line(err)
    assert told.startswith(f"{data / 'train.tokens.bin'}: damaged (it has 0 bytes")
    last = lines(run)[-1]["step"]
    newest = checkpoint.latest_complete(run / "checkpoints")
    assert newest is not None
    # The save that was begun last is whole; a step whose line was not written yet may have one.
    assert checkpoint.step_of(newest) in (last // 3 * 3, last // 3 * 3 + 3)
    assert checkpoint.verify(newest) == []
    assert not list((run / "checkpoints").glob(".*"))
    incident = (run / "incidents.jsonl").read_text().splitlines()[-1]
    assert "train.tokens.bin: damaged" in incident


@pytest.mark.parametrize("straight", ["plain"], indirect=True)
def test_a_run_does_not_go_on_from_nan(straight, cli, compiled, tmp_path):
    options, undisturbed = straight
    run = shutil.copytree(undisturbed, tmp_path / "run")
    last = run / "checkpoints" / f"step_{STEPS}"
    state, files = arrays(last), checkpoint.read_files(last)
    state = {name: jnp.asarray(array) for name, array in state.items()}
    state["params.blocks.attention.query.weight"] = (
        state["params.blocks.attention.query.weight"].at[1, 0, 2, 3].set(jnp.nan)
    )
    with Checkpointer(run / "checkpoints") as checkpointer:
        checkpointer.save(STEPS, state, files)
    done = cli(*options, "--steps", str(STEPS + 1), "--run", run, env=compiled)
    assert done.returncode == 3
    told = f"checkpoint {last}: array params.blocks.attention.query.weight: 1 NaN of "
    assert one_line(done.stderr).startswith(told)
    assert "first at [1, 0, 2, 3]" in done.stderr


@QUICKLY_PLAIN
def test_signals_save_and_a_second_run_is_refused(straight, cli, compiled, tmp_path):
    options, undisturbed = straight
    run = tmp_path / "run"
    process = cli.start(*options, "--run", run, env=compiled)
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGTERM)
    stopped_after(process, run, 75)
    process = cli.start(*options, "--run", run, env=compiled)
    wait_for_step(run, 10, process)
    busy = cli(*options, "--run", run, env=compiled)
    if process.poll() is None:
        assert busy.returncode == 4
        assert f"process {process.pid}" in one_line(busy.stderr)
    process.send_signal(signal.SIGINT)
    if stopped_after(process, run, 130) is not None:
        assert cli(*options, "--run", run, env=compiled).returncode == 0
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.parametrize("straight", ["plain"], indirect=True)
def test_a_second_signal_ends_a_run_at_once(straight, cli, compiled, tmp_path):
    """Two of one kind may come before Python looks, and are one to it: two kinds never are."""
    options, _ = straight
    run = tmp_path / "run"
    # Long steps, and a save that would come after the one that is under way.
    process = cli.start(*options, "--run", run, "--eval-tokens", "65536", env=compiled)
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert one_line(err) == "stopped by SIGTERM"
    # The step under way is lost, and nothing else.
    saved = checkpoint.complete_steps(run / "checkpoints")
    assert saved
    assert [step for step in saved if step % 3] == []
    for step in saved:
        assert checkpoint.verify(run / "checkpoints" / f"step_{step}") == []


def stopped_after(process: subprocess.Popen[str], run: Path, code: int) -> int | None:
    """The step that a signal saved; None where the run was done before it came."""
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        return None
    assert process.returncode == code, err
    step = lines(run)[-1]["step"]
    assert f"after step {step}" in one_line(err)
    assert step in checkpoint.complete_steps(run / "checkpoints")
    return step


def lines_whole(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if line[-1:] == "}"]


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment(straight, cli, compiled, tmp_path, seed):
    options, undisturbed = straight
    options = (*options, "--checkpoint-every", "1")
    run = tmp_path / "run"
    moment = random.Random(seed)
    for _ in range(3):
        process = cli.start(*options, "--run", run, env=compiled)
        time.sleep(moment.uniform(1.0, 9.0))
        process.kill()
        process.communicate()
    assert cli(*options, "--run", run, env=compiled).returncode == 0
    assert_same_run(run, undisturbed, STEPS)


@BOTH
@pytest.mark.parametrize("point", ["arrays-written", "before-rename", "after-rename"])
@pytest.mark.long
def test_killed_while_it_saves(straight, cli, compiled, tmp_path, point):
    options, undisturbed = straight
    run = tmp_path / "run"
    killed = cli(*options, "--run", run, env={**compiled, "MESHLM_FAILPOINT": f"{point}:kill"})
    assert killed.returncode == -signal.SIGKILL
    assert cli(*options, "--run", run, env=compiled).returncode == 0
    assert_same_run(run, undisturbed, STEPS)


# What a run leaves.


def test_run_folder(run_of_10):
    names = {path.name for path in run_of_10.iterdir()}
    assert {"config.json", "log.txt", "metrics.jsonl", "report.html", "tensorboard"} <= names
    assert list((run_of_10 / "tensorboard").iterdir())
    report = (run_of_10 / "report.html").read_text()
    assert "<svg" in report
    assert "://" not in report.replace("http://www.w3.org", "")
    log = (run_of_10 / "log.txt").read_text()
    assert "165,376 parameters" in log
    assert "step 10/10" in log
    assert checkpoint.complete_steps(run_of_10 / "checkpoints") == [4, 8, 10]


def test_metrics_have_every_key(run_of_10):
    found = lines(run_of_10)
    assert [line["step"] for line in found] == list(range(1, 11))
    for line in found:
        assert line.keys() >= KEYS
        assert (line.keys() >= VAL_KEYS) == (line["step"] in (5, 10))
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["mfu"] is None  # a CPU's peak is not known
        assert line["step_s"] > 0
        assert math.isclose(line["tokens_per_s"], 8 * 32 / line["step_s"])
        assert line["skipped"] == 0
    last = found[-1]
    assert math.isclose(last["val_perplexity"], math.exp(last["val_loss"]))
    # A byte-level token of a small vocabulary stands for 1 to 3 bytes.
    assert 1 < last["val_loss"] / math.log(2) / last["val_bits_per_byte"] < 3
    assert last["loss"] < found[0]["loss"]
    # An untrained model is as good as guessing among the rows of its head.
    assert found[0]["loss"] == pytest.approx(math.log(640), abs=0.5)


def test_samples(meshlm, store, tmp_path):
    options = ("--steps", "2", "--sample-every", "1", "--sample-tokens", "4")
    prompts = ("--sample-prompts", "def ", "--- a")
    code, out, _ = meshlm(
        *("train", *SMALL, "--data", store, "--run", tmp_path / "run"), *options, *prompts
    )
    assert code == 0
    found = json.loads((tmp_path / "run" / "samples" / "step_2.json").read_text())
    assert [sample["prompt"] for sample in found["samples"]] == ["def ", "--- a"]
    assert "step 2: 'def " in out


def test_run_whose_messages_nobody_can_read_loses_nothing(cli, compiled, store, tmp_path):
    run = tmp_path / "run"
    words = ("train", *SMALL, "--data", store, "--run", run, "--steps", "6")
    samples = ("--sample-every", "2", "--sample-tokens", "2", "--sample-prompts", "été 日")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = cli.start(*words, *samples, env={**compiled, **locale})
    said = process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 0, process.stderr.read()
    assert said.startswith("test: ")
    (told,) = process.stderr.read().splitlines()
    assert told.endswith(
        "standard output cannot be written any more (Broken pipe): the work goes on without it"
    )
    assert len(lines(run)) == 6
    assert checkpoint.complete_steps(run / "checkpoints") == [6]
    for step in (2, 4, 6):
        found = json.loads((run / "samples" / f"step_{step}.json").read_text("utf-8"))
        assert found["samples"][0]["prompt"] == "été 日"
        assert f"step {step}: 'été 日" in (run / "log.txt").read_text("utf-8")
    assert (run / "report.html").exists()


# Going on.


@pytest.fixture
def run(run_of_10, tmp_path) -> Path:
    """A copy to do with what you like."""
    return Path(shutil.copytree(run_of_10, tmp_path / "run"))


def test_more_steps_continue(meshlm, run, run_of_10):
    code, out, _ = meshlm("train", "--run", run, "--sample-every", "0")
    assert code == 0
    assert "done already" in out
    assert repeatable(run) == repeatable(run_of_10)
    assert meshlm("train", "--run", run, "--steps", "12", "--sample-every", "0")[0] == 0
    assert [line["step"] for line in lines(run)] == list(range(1, 13))
    assert repeatable(run)[:10] == repeatable(run_of_10)
    assert checkpoint.complete_steps(run / "checkpoints") == [8, 10, 12]


def test_a_store_may_move(meshlm, run, store, tmp_path):
    moved = shutil.copytree(store, tmp_path / "moved")
    again = ("train", "--run", run, "--sample-every", "0", "--steps")
    assert meshlm(*again, "11", "--data", moved)[0] == 0
    assert meshlm(*again, "12")[0] == 0
    recorded = json.loads((run / "config.json").read_text())["run"]["data"]
    assert [entry["path"] for entry in recorded] == [str(moved)]


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("--preset", "demo", "test"),
        ("--batch-size", "16", "8"),
        ("--seq-len", "64", "32"),
        ("--seed", "1", "0"),
        ("--learning-rate", "0.5", "0.002"),
        ("--end-learning-rate", "0.5", "0.0002"),
        ("--warmup-steps", "7", "0"),
        ("--anneal-steps", "7", "10"),
        ("--weight-decay", "0", "0.1"),
        ("--clip-norm", "7", "1.0"),
        ("--accumulate", "2", "1"),
        ("--z-loss", "1e-4", "0.0"),
        ("--compute-dtype", "float32", "bfloat16"),
        ("--vocab-size", "1024", "512"),
        ("--document-mask", "true", "False"),
    ],
)
def test_the_past_cannot_change(meshlm, run, option, value, was):
    before = (run / "config.json").read_bytes()
    code, _, err = meshlm("train", "--run", run, option, value)
    assert code == 2
    shown = {"true": "True", "0": "0.0", "7": "7", "1e-4": "0.0001"}.get(value, value)
    said = one_line(err)
    assert f"{option} was {was} in" in said
    assert f"is {shown}" in said
    assert (run / "config.json").read_bytes() == before


def test_other_data_is_refused(meshlm, run, tmp_path, store):
    other = tmp_path / "other"
    (tmp_path / "a.txt").write_text("Other text, and more of it. " * 200)
    assert meshlm("data", "prepare", tmp_path / "a.txt", "--out", other)[0] == 0
    code, _, err = meshlm("train", "--run", run, "--data", other)
    assert code == 2
    assert str(store) in one_line(err)
    assert str(other) in one_line(err)


def test_lines_beyond_the_restored_step_are_dropped(meshlm, run, run_of_10):
    shutil.rmtree(run / "checkpoints" / "step_10")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    code, out, _ = meshlm("train", "--run", run, "--sample-every", "0", "--eval-every", "5")
    assert code == 0
    assert "resumed from" in out
    assert "step_8" in out
    assert_same_run(run, run_of_10, 10)


# Damage.


def damage_one_bit(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << (seed % 8)
    path.write_bytes(data)


def files_of(step: Path) -> list[str]:
    return sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())


def test_verify_names_every_damaged_file(meshlm, run):
    code, out, _ = meshlm("verify", run)
    assert code == 0
    assert out.count("good") == 3
    step = run / "checkpoints" / "step_10"
    for number, name in enumerate(files_of(step)):
        before = (step / name).read_bytes()
        if not before:
            continue
        damage_one_bit(step / name, number)
        code, _, err = meshlm("verify", run)
        assert code == 3, name
        assert f"step_10/{name}" in one_line(err)
        code, _, err = meshlm("verify", step)
        assert code == 3
        assert name in one_line(err)
        (step / name).write_bytes(before)
    (step / "manifest.json").unlink()
    code, _, err = meshlm("verify", run)
    assert code == 3
    assert "step_10/manifest.json is missing" in one_line(err)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(meshlm, run, run_of_10, how):
    step = run / "checkpoints" / "step_10"
    data = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "flip":
        damage_one_bit(data)
    elif how == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "delete":
        data.unlink()
    else:
        (step / "manifest.json").unlink()
    suspected = {p.name: p.read_bytes() for p in step.rglob("*") if p.is_file()}
    code, out, _ = meshlm("train", "--run", run, "--sample-every", "0", "--eval-every", "5")
    assert code == 0
    assert "checkpoints of steps 10 are damaged: going on from step 8; the next save moves" in out
    aside = run / "checkpoints" / "aside" / "step_10"
    assert {p.name: p.read_bytes() for p in aside.rglob("*") if p.is_file()} == suspected
    assert "going on from step 8" in (run / "log.txt").read_text()
    assert_same_run(run, run_of_10, 10)


def test_every_checkpoint_damaged(meshlm, run):
    for step in (4, 8, 10):
        damage_one_bit(run / "checkpoints" / f"step_{step}" / "config.json", step)
    before = (run / "metrics.jsonl").read_bytes()
    for command in (("train", "--run", run), ("generate", run, "--prompt", "a")):
        code, _, err = meshlm(*command)
        assert code == 3
        assert "every checkpoint" in err.splitlines()[-1]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_changed_config_is_refused(meshlm, run):
    path = run / "config.json"
    content = json.loads(path.read_text())
    content["run"]["seed"] = 7
    path.write_text(json.dumps(content))
    code, _, err = meshlm("train", "--run", run)
    assert code == 3
    assert "seed is 0 and 7" in one_line(err)
    content["run"]["sede"] = 7
    path.write_text(json.dumps(content))
    code, _, err = meshlm("train", "--run", run)
    assert code == 3
    assert "did you mean 'seed'" in one_line(err)
    path.write_bytes(b"\x00" * 20)
    assert meshlm("train", "--run", run)[0] == 3


# What is not finite.


def test_not_finite_never_reaches_the_weights(meshlm, store, tmp_path):
    run = tmp_path / "run"
    options = ("--learning-rate", "1e30", "--checkpoint-every", "1", "--warmup-steps", "2")
    command = ("train", *SMALL, "--data", store, "--run", run, "--steps", "40", *options)
    code, out, err = meshlm(*command)
    assert code == 1
    assert "10 steps in a row" in one_line(err)
    found = lines(run)
    skipped = [line["step"] for line in found if line["skipped"]]
    assert skipped == list(range(len(found) - 9, len(found) + 1))
    assert all(line["loss"] is None or line["grad_norm"] is None for line in found[-10:])
    assert out.count("not finite, weights left as before") == 10
    last, earlier = (arrays(run / "checkpoints" / f"step_{len(found) - back}") for back in (0, 2))
    assert int(last["skipped"]) == 10
    for name, value in last.items():
        assert np.isfinite(value).all(), name
        if name.startswith(("params.", "optimizer.")):
            assert value.tobytes() == earlier[name].tobytes(), name
    assert meshlm(*command)[0] == 1
    # A run that begins with such weights is told that they are to blame; its samples are no text.
    after = ("--run", tmp_path / "after", "--init", run, "--steps", "12", "--sample-every", "6")
    code, out, err = meshlm("train", *SMALL[:-2], "--data", store, *after)
    assert code == 1
    assert f"from the weights of {run}: it is the weights and not the data" in one_line(err)
    assert "step 6: no samples: the model's output at position" in out
    assert '"kind": "no samples"' in (tmp_path / "after/incidents.jsonl").read_text()
    assert not list((tmp_path / "after/samples").glob("*"))


def test_a_spike_never_reaches_the_weights(meshlm, store, tmp_path, monkeypatch):
    """The second one is judged by losses from before the run was resumed too."""
    spikes = (80, 95)
    iterate = loop.BatchSource.iterate

    def iterate_with_spikes(self, start, rows):
        for step, batch in enumerate(iterate(self, start, rows), start + 1):
            rare = np.full_like(batch.targets, 511)
            yield dataclasses.replace(batch, targets=rare) if step in spikes else batch

    monkeypatch.setattr(loop.BatchSource, "iterate", iterate_with_spikes)
    options = ("--skip-spikes", "4", "--warmup-steps", "5", "--anneal-steps", "95")
    command = ("train", *SMALL, "--data", store, *options, "--eval-every", "50")
    runs = {name: tmp_path / name for name in ("straight", "resumed", "taken")}
    assert meshlm(*command, "--run", runs["straight"], "--steps", "100")[0] == 0
    assert meshlm(*command, "--run", runs["resumed"], "--steps", "85")[0] == 0
    code, out, _ = meshlm(*command, "--run", runs["resumed"], "--steps", "100")
    assert code == 0
    assert "step 95: the loss was a spike, weights left as before" in out
    found = {name: lines(runs[name]) for name in ("straight", "resumed")}
    for name in found:
        assert [line["step"] for line in found[name] if line["skipped"]] == list(spikes), name
    for one, two in zip(found["straight"], found["resumed"], strict=True):
        assert (one["loss"], one["grad_norm"]) == (two["loss"], two["grad_norm"])
    assert "the loss was a spike" in (runs["resumed"] / "report.html").read_text()
    # Too early there are too few losses to judge by.
    spikes = (60,)
    assert meshlm(*command, "--run", runs["taken"], "--steps", "62")[0] == 0
    assert not any(line["skipped"] for line in lines(runs["taken"]))


# Disk.


def test_too_little_disk_is_said_first(meshlm, store, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    command = ("train", *SMALL, "--data", store, "--run", tmp_path / "run", "--steps", "3")
    code, _, err = meshlm(*command, "--checkpoint-every", "1")
    assert code == 2
    assert "too little disk for 3 checkpoints" in one_line(err)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    code, _, err = meshlm(*command, "--checkpoint-every", "1", "--steps", "2147483647")
    assert code == 2


def test_a_last_save_that_fails_is_no_success(meshlm, run, monkeypatch):
    monkeypatch.setenv("MESHLM_FAILPOINT", "arrays-written:error")
    more = (
        "train",
        "--run",
        run,
        "--steps",
        "13",
        "--checkpoint-every",
        "1",
        "--sample-every",
        "0",
    )
    code, out, err = meshlm(*more)
    assert code == 1
    assert "step 13 was not saved" in one_line(err)
    assert "step 11 was not saved" in out
    assert checkpoint.complete_steps(run / "checkpoints") == [4, 8, 10]
    monkeypatch.delenv("MESHLM_FAILPOINT")
    assert meshlm(*more)[0] == 0
    assert checkpoint.complete_steps(run / "checkpoints") == [11, 12, 13]


def test_a_full_disk_is_lines_and_not_traces(cli, compiled, store, tmp_path):
    words = ("train", *SMALL, "--data", store, "--run", tmp_path / "run", "--steps", "6")
    command = shlex.join(cli.command(*words, "--checkpoint-every", "2"))
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 200; exec {command}"],
        env={**cli.environment(), **compiled},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "checkpoint of step 6 was not saved" in one_line(done.stderr)
    assert "step 4: checkpoint of step 2 was not saved" in done.stdout
    assert len(lines(tmp_path / "run")) == 6
    assert checkpoint.complete_steps(tmp_path / "run" / "checkpoints") == []


# Memory.


def test_a_device_without_memory_is_a_line_with_the_plans_numbers(
    meshlm, store, tmp_path, monkeypatch
):
    command = ("train", *SMALL, "--data", store, "--steps", "6", "--checkpoint-every", "2")
    assert meshlm(*command, "--run", tmp_path / "straight")[0] == 0
    compiled_step = loop.compile_train_step

    def compile_and_fail_at_5(config):
        step, calls = compiled_step(config), []

        def run(state, batch):
            calls.append(state)
            if len(calls) == 5:
                jax.jit(lambda: jnp.zeros(1 << 45, jnp.int8) + 1)()
            return step(state, batch)

        return run

    monkeypatch.setattr(loop, "compile_train_step", compile_and_fail_at_5)
    run = tmp_path / "run"
    code, _, err = meshlm(*command, "--run", run)
    assert code == 1
    assert re.search(r"out of memory on cpu .* needs [0-9.]+ GB .* --remat full", one_line(err))
    assert checkpoint.complete_steps(run / "checkpoints") == [2, 4]
    incidents = (run / "incidents.jsonl").read_text()
    assert "out of memory" in incidents
    monkeypatch.setattr(loop, "compile_train_step", compiled_step)
    code, out, _ = meshlm(*command, "--run", run)
    assert code == 0
    assert "resumed from" in out
    assert_same_run(run, tmp_path / "straight", 6)


# Views of a run.


def test_a_run_without_its_views_loses_nothing(meshlm, run, run_of_10, tmp_path, caplog):
    """What TensorBoard and the report want to write to cannot be written: the truth is whole."""
    shutil.copytree(run, tmp_path / "with")
    more = ("--steps", "13", "--sample-every", "0")
    assert meshlm("train", "--run", tmp_path / "with", *more)[0] == 0
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("in the way")
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    caplog.clear()
    code, _, err = meshlm("train", "--run", run, *more)
    assert code == 0, err
    assert caplog.text.count("TensorBoard events stop here") == 1
    warned = [r.getMessage() for r in caplog.records if "report.html" in r.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("the report cannot be written (")
    assert_same_run(run, tmp_path / "with", 13)


# The other optimizer.


def test_adafactor_stopped_and_run_again(meshlm, store, tmp_path):
    command = ("train", *SMALL, "--data", store, "--optimizer", "adafactor", "--warmup-steps", "1")
    every = ("--checkpoint-every", "3", "--eval-every", "3", "--sample-every", "0")
    command = (*command, "--anneal-steps", "20", *every)
    assert meshlm(*command, "--run", tmp_path / "straight", "--steps", "6")[0] == 0
    run = tmp_path / "run"
    assert meshlm(*command, "--run", run, "--steps", "3")[0] == 0
    assert meshlm("train", "--run", run, "--steps", "6", *every)[0] == 0
    assert_same_run(run, tmp_path / "straight", 6)
    step = run / "checkpoints" / "step_6"
    kept = arrays(step)
    assert {name.split(".")[1] for name in kept if name.startswith("optimizer.")} == {"adafactor"}
    assert lines(run)[-1]["loss"] < lines(run)[0]["loss"]
    code, _, err = meshlm("train", "--run", run, "--optimizer", "adamw")
    assert code == 2
    assert "--optimizer was adafactor" in one_line(err)
    # Other runs begin with its weights, and cannot go on with Adam's moments that it has not.
    words = ("train", *SMALL[2:], "--data", store, "--run", tmp_path / "other", "--steps", "1")
    code, _, err = meshlm(*words, "--resume-from", step)
    assert code == 2
    assert "no moments of Adam" in one_line(err)
    assert meshlm(*words, "--init", step)[0] == 0
    assert meshlm("verify", run)[0] == 0
