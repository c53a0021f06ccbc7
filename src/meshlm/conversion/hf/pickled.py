"""PyTorch's pickled weights as safetensors, made in a process of their own.

A pickle is a program. Torch runs it with nothing but what weights need (`weights_only`), and this
module has torch do so in a separate process, which hands back plain bytes that are checked as any
other file. Nothing here runs unless a person allowed it.
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshlm.core.errors import BadInputError, MeshLMError, UsageError
from meshlm.formats.safetensors import TensorWriter
from meshlm.formats.tensor import DTYPES, TensorInfo

# Older ones ran code from the pickle even with weights_only (CVE-2025-32434).
OLDEST_TORCH = (2, 6)
_REFUSED = 3


@contextlib.contextmanager
def as_safetensors(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields the same tensors in safetensors files, one for each of `paths`, that are then removed.

    They may be removed once they are open.

    Raises:
        UsageError: torch is not installed, or too old.
        BadInputError: a file holds more than weights, or is damaged.
    """
    check_torch()
    folder = Path(tempfile.mkdtemp(prefix="meshlm-"))
    try:
        made = [folder / f"{number}.safetensors" for number in range(len(paths))]
        for path, target in zip(paths, made, strict=True):
            _run(path, target)
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_torch() -> None:
    """Raises UsageError where there is no torch that can be used."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "pytorch_model.bin is read with torch, which is not installed: pip install torch, or "
            "get the model's safetensors files"
        )


def _run(path: Path, target: Path) -> None:
    # -P: a torch.py in the working folder is not the one that is meant.
    command = [sys.executable, "-P", "-m", "meshlm.conversion.hf.pickled", str(path), str(target)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if ended.returncode == 0:
        return
    said = ended.stdout.decode(errors="replace").strip().splitlines()
    if ended.returncode == _REFUSED and said:
        raise BadInputError(f"{path}: {said[-1]}")
    raise MeshLMError(
        f"{path}: the process that reads it ended with code {ended.returncode}: is there room for "
        f"{os.path.getsize(path)} bytes in {target.parent} (TMPDIR names another place) and "
        "memory for them?"
    )


def write_safetensors(path: Path, target: Path) -> None:
    """Writes the tensors of a pickled state dict to a new safetensors file.

    Raises:
        BadInputError: it holds anything but tensors, or more of them than its size allows.
    """
    torch = _import_torch()
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise BadInputError(
            f"torch {torch.__version__} is not safe to read it with: install torch "
            f"{'.'.join(map(str, OLDEST_TORCH))} or later"
        )
    tensors = _load(path)
    dtypes = {getattr(torch, name): dtype for name, dtype in DTYPES.items()}
    # Buffers: the mask, which some versions saved.
    dtypes |= {torch.bool: np.dtype(np.bool_), torch.uint8: np.dtype(np.uint8)}
    # Weights may share bytes (tied ones do), but not so that a small file fills the disk.
    left = 2 * path.stat().st_size
    infos: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes or tensor.layout != torch.strided:
            raise BadInputError(f"{name[:200]} is {tensor.dtype}, {tensor.layout}: not a weight")
        infos[name] = TensorInfo(shape=tuple(tensor.shape), dtype=dtypes[tensor.dtype])
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            raise BadInputError("its tensors are larger than the file")
    writer = TensorWriter(target, infos, {})
    for name, tensor in tensors.items():
        # Numpy knows no bfloat16 of torch's: it gets the bytes.
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        writer.write(name, flat.view(infos[name].dtype).reshape(infos[name].shape))
    writer.finish()


def _import_torch() -> Any:
    return importlib.import_module("torch")  # only in the separate process


def _load(path: Path) -> dict[str, Any]:
    torch = _import_torch()
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # the form before torch 1.6 cannot be mapped
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a hostile file brings about
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInputError(f"torch does not take it for weights alone ({lines[0]})") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in loaded.items()
    ):
        raise BadInputError("it is not a dict of tensors by name")
    return dict(loaded)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of this module as a program: IN, OUT."""
    source, target = map(Path, arguments)
    try:
        write_safetensors(source, target)
    except BadInputError as error:
        print(error)
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
