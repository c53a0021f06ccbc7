"""Agreements: alone they are one's own, and all stop after one step."""

from __future__ import annotations

import pytest

from meshlm.core import processes
from meshlm.core.errors import MeshLMError, UsageError
from meshlm.core.place import ProcessConfig


def test_alone_every_agreement_is_ones_own():
    processes.join(ProcessConfig())
    assert processes.count() == 1
    assert processes.is_first()
    assert processes.together(lambda: 5) == 5
    assert processes.share(lambda: "x") == "x"
    assert processes.measure_all_reduce() is None
    stop = processes.Stop()
    assert [stop.code_after(1, None), stop.code_after(2, 75)] == [None, 75]
    processes.say_failed(ValueError("nobody hears"))
    processes.leave()
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)


class Store:
    """The coordinator's key-value store, for processes that take turns in one thread."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise processes._jax_error()(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise processes._jax_error()(f"NOT_FOUND: {key}")
        return self.values[key]


@pytest.mark.parametrize("ahead", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("told_too", [None, 1, 2])
def test_all_stop_after_one_step(monkeypatch, ahead, told_too):
    """However far the other one is ahead, as far as a step that needs both allows."""
    store = Store()
    monkeypatch.setattr(processes, "_client", lambda: store)
    monkeypatch.setattr(processes, "_watch", object())
    told, other = processes.Stop(), processes.Stop()
    steps = {told: 10, other: 10 + ahead}
    ends = {}
    for turn in range(20):
        for stop in (told, other):
            if stop in ends:
                continue
            code = 75 if stop is told else None
            if stop is other and told_too is not None and turn >= told_too:
                code = 130
            found = stop.code_after(steps[stop], code)
            if found is not None:
                ends[stop] = (steps[stop], found)
            # No step ends before it has begun in both.
            elif steps[stop] - min(steps.values()) < 2:
                steps[stop] += 1
    assert ends[told] == ends[other]
    assert ends[told][1] == 75


def test_an_error_says_its_line_and_code():
    assert processes._line_of(UsageError("--x 3: give 4")) == "--x 3: give 4"
    assert processes._line_of(ValueError("first\nsecond")) == "ValueError: first"
    codes = [processes._code_of(e) for e in (UsageError("x"), KeyboardInterrupt(), ValueError())]
    assert codes == [2, 130, 1]
    assert processes._code_of(MeshLMError("x")) == 1


class Silence:
    """A watch whose look at the others fails; notes what it is told to say."""

    def __init__(self):
        self.asked, self.said = 0, []

    def blame_the_silent(self):
        self.asked += 1
        raise RuntimeError("process 0 is not reached")

    def say_failed(self, reason, exit_code):
        self.said.append((reason, exit_code))


def test_an_error_is_said_once_and_stays_itself(monkeypatch):
    watch = Silence()
    monkeypatch.setattr(processes, "_watch", watch)
    monkeypatch.setattr(processes, "_known", None)
    error = processes._jax_error()("an exchange failed")
    processes.say_failed(error)
    processes.say_failed(error)
    assert watch.asked == 1
    assert watch.said == [("JaxRuntimeError: an exchange failed", 1)]
    processes.say_failed(MeshLMError("another"))
    assert watch.said[1:] == [("another", 1)]
    processes.say_failed(processes.agree(MeshLMError("known to all")))
    assert len(watch.said) == 2
