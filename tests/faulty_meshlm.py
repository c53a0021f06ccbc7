"""`meshlm` with an engine that is slow, or fails: SECONDS_A_TURN TURNS_BEFORE_IT_FAILS ARGUMENTS...

What it does with a fault is to be seen on a whole server, in a process of its own.
"""

from __future__ import annotations

import sys
import time

from meshlm.cli.main import main
from meshlm.serving.worker import Worker


def spoil(turn_s: float, turns: int) -> None:
    """Makes each turn take longer, and the one after `turns` of them fail (0: none)."""
    turn, taken = Worker.turn, 0

    def spoilt(worker: Worker) -> None:
        nonlocal taken
        taken += 1
        time.sleep(turn_s)
        if taken == turns:
            raise RuntimeError("spoilt for a test")
        turn(worker)

    Worker.turn = spoilt


if __name__ == "__main__":
    spoil(float(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[1:3]
    sys.exit(main())
