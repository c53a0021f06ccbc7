"""SIGTERM and SIGINT: once means finish the step and save, twice means stop now."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopSignals:
    """Notes the first SIGTERM or SIGINT while its `with` block runs; the second acts as usual.

    Outside of the main thread, where Python takes no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        """75 after SIGTERM, 130 after SIGINT, None before either."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _EXIT_CODES:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = _EXIT_CODES[signal.Signals(number)]
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
