"""A wait that lasts says what it is for: soon, then ever rarer; a short one says nothing."""

from __future__ import annotations

import logging
import threading
import types

import pytest

from meshlm.core import waiting
from meshlm.core.waiting import Waiting


@pytest.fixture
def pauses(monkeypatch, caplog):
    """Makes pauses end at once, `left` of them; returns how long they would have been."""
    caplog.set_level(logging.WARNING)
    asked: list[float] = []
    done = threading.Event()

    def start(left: int) -> tuple[list[float], threading.Event]:
        class Over(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                assert timeout is not None
                if len(asked) < left:
                    asked.append(timeout)
                    return False
                done.set()
                return super().wait()

        replaced = types.SimpleNamespace(Event=Over, Thread=threading.Thread)
        monkeypatch.setattr(waiting, "threading", replaced)
        monkeypatch.setattr(waiting, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
        return asked, done

    return start


def test_it_is_said_within_ten_seconds_and_then_ever_rarer(pauses, caplog):
    asked, done = pauses(9)
    with Waiting(lambda: "waiting for rain", 300):
        assert done.wait(60)
    assert asked[0] < 10
    assert asked == [8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert set(caplog.messages) == {"waiting for rain (for 0 s so far, 300 s more at most)"}
    assert len(caplog.messages) == 9


def test_what_is_said_is_what_is_known_then(pauses, caplog):
    _, done = pauses(2)
    reasons = iter(["no cloud", "one cloud"])
    with Waiting(lambda: next(reasons)):
        assert done.wait(60)
    assert caplog.messages == ["no cloud (for 0 s so far)", "one cloud (for 0 s so far)"]


def test_a_short_wait_says_nothing(caplog):
    for _ in range(100):
        with Waiting(lambda: "nothing"):
            pass
    assert not caplog.records
    assert not [t for t in threading.enumerate() if t.name == "waiting"]
