"""The first signal is noted, the second acts as usual."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from meshlm.training.signals import StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_first_is_noted_and_the_second_is_not(number, code):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.exit_code is None
        os.kill(os.getpid(), number)
        assert signals.exit_code == code
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_of_the_main_thread_it_notes_nothing():
    seen = []

    def work() -> None:
        with StopSignals() as signals:
            seen.append(signals.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
