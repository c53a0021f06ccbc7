"""One run folder, one run at a time."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from meshlm.core.errors import BusyError

LOCK_NAME = ".lock"


class RunLock:
    """Holds a run folder while its `with` block runs; the folder is made if it is not there.

    The lock is the kernel's (flock), so it ends with the process however that dies, and a lock file
    that is left behind holds nobody up. The file is never removed: a new one beside a held one
    would let two runs in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        """Raises: BusyError at once when another run holds the folder, naming its pid and host."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(self._folder / LOCK_NAME, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"run folder {self._folder} is in use by {_holder(file)}; "
                    "stop that run or choose another --run"
                ) from None
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
            stack.pop_all()
            self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        content = json.loads(file.read(1000))
        return f"process {int(content['pid'])} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
