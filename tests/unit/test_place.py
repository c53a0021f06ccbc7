"""Where a process finds its place: by options, environment, or what JAX reads off a scheduler."""

from __future__ import annotations

import pytest

from meshlm.core.errors import UsageError
from meshlm.core.place import ProcessConfig, find_place

SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "node[07-08],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "JAX_COORDINATOR_PORT",
        "KUBERNETES_SERVICE_HOST",
        *SLURM,
    ):
        monkeypatch.delenv(name, raising=False)


def place(monkeypatch, variables=(), **options):
    for name, value in dict(variables).items():
        monkeypatch.setenv(name, value)
    return find_place(ProcessConfig(**options))


def test_alone_where_nothing_says_otherwise(monkeypatch):
    assert place(monkeypatch) is None
    assert place(monkeypatch, {"JAX_NUM_PROCESSES": "1"}) is None


def test_by_environment_and_options_win(monkeypatch):
    variables = {
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    assert place(monkeypatch, variables) == ("a:1", 4, 3, None)
    assert place(monkeypatch, coordinator="b:2", process_id=0) == ("b:2", 4, 0, None)
    # What the environment says in full is not asked of the scheduler.
    assert place(monkeypatch, SLURM) == ("a:1", 4, 3, None)


def test_by_slurm_through_jax(monkeypatch):
    address, count, number, devices = place(monkeypatch, SLURM)
    assert address.rpartition(":")[0] == "node07"
    assert (count, number, devices) == (4, 2, [1])
    assert place(monkeypatch, coordinator="a:1") == ("a:1", 4, 2, [1])
    assert place(monkeypatch, {"SLURM_NTASKS": "1"}) is None


def test_one_process_asks_no_scheduler(monkeypatch):
    def asked(*_):
        raise AssertionError("a scheduler was asked")

    monkeypatch.setattr("meshlm.core.place._ask_scheduler", asked)
    assert place(monkeypatch, SLURM, num_processes=1) is None


@pytest.mark.parametrize(
    ("variables", "options", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "--num-processes and --process-id missing beside"),
        ({}, {"num_processes": 2}, "--coordinator and --process-id missing beside --num-processes"),
        ({"JAX_PROCESS_ID": "x"}, {}, "JAX_PROCESS_ID=x is no number"),
        ({}, {"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "give 0 to 1"),
        ({}, {"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "es 0: give 1 or"),
        ({}, {"num_processes": 0}, "--num-processes 0: give 1 or more"),
        ({"JAX_PROCESS_ID": "\u00b2"}, {}, "is no number"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, variables, options, words):
    with pytest.raises(UsageError) as caught:
        place(monkeypatch, variables, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"), [("join_timeout_s", 0), ("heartbeat_timeout_s", 4), ("join_timeout_s", -1)]
)
def test_times_that_are_too_short_are_refused(option, value):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} {value}: give "):
        ProcessConfig(**{option: value})
