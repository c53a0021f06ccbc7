"""Waits that say what they wait for, so that no process is silent for long."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

_log = logging.getLogger(__name__)

_FIRST_S = 8.0
_LONGEST_PAUSE_S = 300.0
_LINGER_S = 5.0


class Waiting:
    """Warns what is waited for while its `with` block runs: within ten seconds, then ever rarer.

    The warnings come from a thread of their own, since the block may be stuck in the system.

    Args:
        what: returns what is waited for and why it takes so long, as known now.
        timeout_s: seconds after which the block gives up by itself; None where it does not.
    """

    def __init__(self, what: Callable[[], str], timeout_s: float | None = None) -> None:
        self._what, self._timeout_s = what, timeout_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._warn, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        # What it asks may be a library that must not be in use when Python ends.
        self._thread.join(_LINGER_S)

    def _warn(self) -> None:
        pause_s = _FIRST_S
        while not self._over.wait(pause_s):
            what = self._what()
            if self._over.is_set():
                return
            spent_s = time.monotonic() - self._began_s
            time_text = f"for {spent_s:.0f} s so far"
            if self._timeout_s is not None:
                left_s = max(0.0, self._timeout_s - spent_s)
                time_text += f", {left_s:.0f} s more at most"
            _log.warning("%s (%s)", what, time_text)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
