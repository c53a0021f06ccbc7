"""The bytes of a weights file, read piece by piece into memory of our own.

Nothing is mapped. A mapped file that is cut while it is read, for example by a download that begins
again, ends the process with SIGBUS, and no check before the access can prevent it.
"""

import abc
import os
import weakref
from pathlib import Path

import numpy as np

from meshlm.core.errors import BadInputError, MeshLMError
from meshlm.core.files import open_descriptor, read_at


class Content(abc.ABC):
    """A known number of bytes; any range of them can be read, from any thread."""

    num_bytes: int

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns bytes `start` to `stop`, which must exist, as a read-only uint8 array."""


class MemoryContent(Content):
    """Bytes in memory; `read` returns views of them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
        self.num_bytes = self._data.size

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._data[start:stop]


class FileContent(Content):
    """The bytes that a file had when it was opened. The file stays open and is not mapped."""

    def __init__(self, path: Path) -> None:
        """Raises:
        OSError: the file cannot be opened.
        UsageError: it is a named pipe or another thing without an end.
        """
        self._path = path
        self._descriptor = open_descriptor(path)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns a copy of a range.

        Raises:
            BadInputError: the file was cut since it was opened.
            MeshLMError: it cannot be read now.
        """
        result = np.empty(stop - start, np.uint8)
        try:
            count = read_at(self._descriptor, start, memoryview(result))
            now = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise MeshLMError(
                f"{self._path}: cannot be read ({error.strerror}): run the same command again when "
                "it can"
            ) from error
        if count < len(result):
            raise BadInputError(
                f"{self._path}: it was cut while it was read: it had {self.num_bytes:,} bytes and "
                f"has {now:,} now; get the file again"
            )
        result.flags.writeable = False
        return result
