"""One run folder, one run at a time."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from meshlm.core import files, strict_json
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
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Takes the lock, and writes who has it.

        Raises:
            BusyError: at once when another run holds the folder, naming its pid and host.
            UsageError: what has the lock's name is a link, a pipe or another thing that is no file.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(files.update(self._folder / LOCK_NAME, make=True))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"run folder {self._folder} is in use by {_holder(file)}; "
                    "stop that run or choose another --run"
                ) from None
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
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


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        content = strict_json.parse_object(file.read(1000), LOCK_NAME)
        return f"process {int(content['pid'])} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
