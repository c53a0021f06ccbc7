"""A file of numbers, read piece by piece, that may be cut or changed by others while it is read.

A mapped file that is cut ends the process with SIGBUS at the next look at it, and no check before
the look can rule that out. So pieces are read with `pread` into memory of our own, where a file
that is too short is an error like any other.
"""

import os
import threading
import time
import weakref
from pathlib import Path
from typing import overload

import numpy as np

from meshlm.core.errors import BadInputError, MeshLMError
from meshlm.core.files import hash_open, open_descriptor, read_at

_LOOK_EVERY_S = 1.0


class NumberFile:
    """A sequence of numbers of one type; each access reads what is asked for, in any thread.

    The file stays open: one that is replaced under its name is read on as it was. Once a second a
    read looks at the size and the time of its last change first.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_bytes: int, sha256: str) -> None:
        """Opens the file, which should have this length and checksum. The latter is not tried.

        Raises:
            BadInputError: it has another length.
        """
        self._path, self._dtype, self._num_bytes, self._sha256 = path, dtype, num_bytes, sha256
        self._descriptor = open_descriptor(path)
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        self._refuse_other_size(found.st_size)
        self._changed_ns, self._looked_s = found.st_mtime_ns, time.monotonic()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_bytes // self._dtype.itemsize

    @overload
    def __getitem__(self, index: int) -> np.generic: ...
    @overload
    def __getitem__(self, index: slice) -> np.ndarray: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | np.generic:
        """Returns one number, or those of a slice without steps, as an array.

        Raises:
            BadInputError: the file was cut or changed since it was opened.
            MeshLMError: it cannot be read now.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self._read(start, max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._read(index % len(self), index % len(self) + 1)[0]

    def _read(self, start: int, stop: int) -> np.ndarray:
        numbers = np.empty(stop - start, self._dtype)
        try:
            self._look()
            target = memoryview(numbers.view(np.uint8))
            if read_at(self._descriptor, start * self._dtype.itemsize, target) < len(target):
                self._refuse_other_size(os.fstat(self._descriptor).st_size)
                raise self._damaged("it ends too early")
        except OSError as error:
            raise MeshLMError(
                f"{self._path}: cannot be read ({error.strerror}): run the same command again when "
                "it can"
            ) from error
        return numbers

    def _look(self) -> None:
        """Raises BadInputError where the file is another one than when it was opened."""
        with self._lock:
            if time.monotonic() - self._looked_s < _LOOK_EVERY_S:
                return
            found = os.fstat(self._descriptor)
            self._refuse_other_size(found.st_size)
            if found.st_mtime_ns != self._changed_ns:
                # Somebody may just have touched it: that must not end a run of weeks.
                if hash_open(self._descriptor) != self._sha256:
                    raise self._damaged("its content changed while it was in use")
                self._changed_ns = found.st_mtime_ns
            self._looked_s = time.monotonic()

    def _refuse_other_size(self, num_bytes: int) -> None:
        if num_bytes != self._num_bytes:
            raise self._damaged(
                f"it has {num_bytes:,} bytes, and {self._num_bytes:,} by its manifest"
            )

    def _damaged(self, why: str) -> BadInputError:
        return BadInputError(
            f"{self._path}: damaged ({why}): restore it from a copy, or prepare the store again "
            "with --force"
        )
