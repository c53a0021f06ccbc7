"""Files of numpy arrays, written array by array, to the byte as `np.savez` writes them."""

import zipfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from meshlm.core import files
from meshlm.formats.npy import write_array


class NpzWriter:
    """A new file of arrays, as `np.savez` writes it; each is written as it is added."""

    def __init__(self, path: Path) -> None:
        self._target = files.create(path)
        self._file = zipfile.ZipFile(self._target, "w")
        self._count = 0

    def add(self, array: np.ndarray) -> None:
        """Writes the next array, any view of one; bfloat16 as two bytes of anything."""
        name = f"arr_{self._count}.npy"
        with self._file.open(name, "w", force_zip64=True) as file:
            write_array(file.write, array)
        self._count += 1

    def close(self) -> None:
        """Writes the directory; the file is whole after this."""
        self._file.close()
        self._target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
