"""`meshlm train` and `generate` on meshes of eight virtual devices: the same numbers as on one."""

from __future__ import annotations

import shutil

import pytest

from runs import SMALL, lines

pytestmark = pytest.mark.timeout(900)

MESHES = {"1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "1x2x4": (1, 2, 4), "2x2x2": (2, 2, 2)}
# tests/sharding compares a step on the others too.
QUICK_MESHES = [
    name if name in ("1x2x4", "2x2x2") else pytest.param(name, marks=pytest.mark.long)
    for name in MESHES
]
STEPS = 5
OPTIONS = ("--steps", "5", "--compute-dtype", "float32", "--eval-every", "5")
NUMBERS = ("loss", "grad_norm", "val_loss")
TOLERANCE = 1e-5


def mesh(name: str) -> list[str]:
    axes = zip(("replica", "data", "model"), MESHES.get(name, (1, 1, 1)), strict=True)
    return [word for axis, size in axes for word in (f"--mesh.{axis}", str(size))]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, store, shared_compilation):
    """The run on 1x1x1, saved at steps 3 and 5."""
    from meshlm.cli.main import main

    run = tmp_path_factory.mktemp("one") / "run"
    words = ["train", *SMALL, "--data", str(store), "--run", str(run), *OPTIONS]
    assert main([*words, "--checkpoint-every", "3"]) == 0
    return run


def assert_close(run, other, first: int = 1) -> None:
    found, wanted = lines(run), lines(other)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for one, two in zip(found[first - 1 :], wanted[first - 1 :], strict=True):
        for name in NUMBERS:
            assert (name in one) == (name in two)
            if name in one:
                assert one[name] == pytest.approx(two[name], rel=TOLERANCE), (one["step"], name)


@pytest.mark.parametrize("name", QUICK_MESHES)
def test_losses_are_those_of_one_device(meshlm, store, tmp_path, on_one_device, name):
    run = tmp_path / "run"
    code, out, _ = meshlm("train", *SMALL, "--data", store, "--run", run, *OPTIONS, *mesh(name))
    assert code == 0
    replica, data, model = MESHES[name]
    assert f"mesh replica {replica} x data {data} x model {model}" in out
    assert_close(run, on_one_device)


@pytest.mark.parametrize(
    ("rules", "mesh"),
    [
        pytest.param("data", "replica 8 x data 1", marks=pytest.mark.long),
        pytest.param("fsdp", "replica 1 x data 8", marks=pytest.mark.long),
        ("replica-fsdp", "data 8"),
    ],
)
def test_rules_alone_take_all_devices(meshlm, store, tmp_path, on_one_device, rules, mesh):
    run = tmp_path / "run"
    words = ("train", *SMALL, "--data", store, "--run", run, *OPTIONS, "--sharding", rules)
    code, out, _ = meshlm(*words)
    assert code == 0
    assert mesh in out
    computed = "float32 products, gradients summed in float32, plain attention"
    assert f"split by the rules {rules}; {computed}" in out
    assert_close(run, on_one_device)


def test_a_run_goes_on_by_other_rules_and_accumulates_on_copies(
    meshlm, store, tmp_path, on_one_device
):
    """Two parts, whose gradients each of the copies adds up by itself; chunked attention too."""
    run = tmp_path / "run"
    words = ("train", *SMALL, "--data", store, "--run", run, *OPTIONS, "--accumulate", "2")
    tensor = ("--sharding", "tensor", "--checkpoint-every", "3", *mesh("2x2x2"))
    assert meshlm(*words, *tensor)[0] == 0
    assert_close(run, on_one_device)
    shutil.rmtree(run / "checkpoints" / "step_5")
    go_on = ("train", "--run", run, "--sample-every", "0", "--eval-every", "5")
    other = ("--sharding", "replica-fsdp", "--mesh.replica", "2", "--attention", "chunked")
    assert meshlm(*go_on, *other)[0] == 0
    assert_close(run, on_one_device)
    code, _, err = meshlm(*go_on, "--attention", "splash", "--steps", "6")
    assert code == 2
    assert "--attention splash: it does not compile for cpu" in err


def test_a_run_goes_on_on_other_meshes(meshlm, tmp_path, on_one_device):
    run = tmp_path / "run"
    shutil.copytree(on_one_device, run)
    shutil.rmtree(run / "checkpoints" / "step_5")
    go_on = ("train", "--run", run, "--sample-every", "0", "--eval-every", "5")
    assert meshlm(*go_on, "--checkpoint-every", "4", "--steps", "4", *mesh("1x2x4"))[0] == 0
    assert meshlm(*go_on, "--steps", "5", *mesh("1x8x1"))[0] == 0
    found, wanted = lines(run), lines(on_one_device)
    assert found[:3] == wanted[:3]
    for step in (4, 5):
        for name in ("loss", "grad_norm"):
            assert found[step - 1][name] == pytest.approx(wanted[step - 1][name], rel=TOLERANCE)


@pytest.mark.parametrize("name", [pytest.param("1x8x1", marks=pytest.mark.long), "2x2x2"])
def test_generate_gives_the_same_text(meshlm, on_one_device, name):
    command = ("generate", on_one_device, "--prompt", "def ", "--max-tokens", "12")
    assert meshlm(*command, *mesh(name)) == meshlm(*command)


def test_a_process_with_virtual_devices(cli, compiled, store, tmp_path, on_one_device):
    run = tmp_path / "run"
    words = ("train", *SMALL, "--data", store, "--run", run, *OPTIONS, *mesh("1x2x4"))
    done = cli(*words, devices=8, env=compiled)
    assert done.returncode == 0, done.stderr
    assert_close(run, on_one_device)
    refused = cli(*words, devices=4, env=compiled)
    assert refused.returncode == 2
    assert "wants 8 devices and 4 are here" in refused.stderr
