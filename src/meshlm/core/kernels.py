"""Kernels in C for decoding on a CPU, compiled on the user's machine where there is a compiler.

Nothing has to be compiled to install MeshLM, and everything works without: XLA then computes the
same, slower. The library lies in a folder that only the user may write to, by a hash of all that it
depends on, and is built once.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from meshlm.core.errors import UsageError
from meshlm.core.private_folder import private_folder

PRODUCTS = "meshlm_products"
"""The name of the call that multiplies; see kernels.c."""

ATTENTION = "meshlm_attention"
"""The name of the call that attends to a cache."""

SWITCH = "MESHLM_KERNELS"
"""The environment variable that turns them off, with the value `off`."""

_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
_TARGETS = (PRODUCTS, ATTENTION)
_COMPILE_TIMEOUT_S = 120
# The first one includes the others.
_SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("kernels.c", "kernels_products.h", "kernels_attention.h")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Whether the kernels are there."""

    ready: bool
    detail: str
    """The library's path, or why there is none."""


# Several threads may trace at once.
_lock = threading.Lock()


class _NoKernelsError(Exception):
    """Why they cannot be had."""


def kernels() -> Kernels:
    """Returns whether the kernels are there; compiles and registers them the first time."""
    with _lock:
        return _find()


@functools.cache
def _find() -> Kernels:
    try:
        if os.environ.get(SWITCH) == "off":
            raise _NoKernelsError(f"{SWITCH}=off")
        path = _library()
        _register(path)
    except (_NoKernelsError, UsageError, OSError, subprocess.SubprocessError) as error:
        return Kernels(ready=False, detail=str(error))
    return Kernels(ready=True, detail=str(path))


def _library() -> Path:
    """Returns the library's path, after building it where it is not there yet."""
    import jax

    compiler = shutil.which("cc")
    if compiler is None:
        raise _NoKernelsError("there is no C compiler (cc) on PATH")
    sources = [path.read_bytes() for path in _SOURCES]
    include = Path(jax.ffi.include_dir())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=10).stdout
    parts = (*sources, (include / "xla/ffi/api/c_api.h").read_bytes(), version, _processor())
    key = hashlib.sha256(b"\0".join((*parts, " ".join(_FLAGS).encode()))).hexdigest()[:32]
    folder = private_folder("kernels")
    if folder is None:
        raise _NoKernelsError("the user has no cache folder that can be written: XDG_CACHE_HOME")
    path = folder / f"kernels-{key}.so"
    if not path.exists():
        _compile(compiler, include, path)
    return path


def _processor() -> bytes:
    """Returns what -march=native depends on: the processor's name and what it can do."""
    lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(line for line in lines if line.startswith(names))


def _compile(compiler: str, include: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        built = Path(name) / "kernels.so"
        ran = subprocess.run(
            [
                compiler,
                *_FLAGS,
                "-fPIC",
                "-shared",
                f"-I{include}",
                str(_SOURCES[0]),
                "-o",
                str(built),
            ],
            capture_output=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        if ran.returncode:
            last = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise _NoKernelsError(f"{compiler} fails: {''.join(last)}")
        # Several processes may build at once: each replaces the other's with the same.
        built.replace(path)


def _register(path: Path) -> None:
    import jax

    library = ctypes.CDLL(str(path))
    try:
        for name in _TARGETS:
            target = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, target, platform="cpu")
    except (AttributeError, RuntimeError, ValueError) as error:
        # A symbol is missing, or JAX does not take it: of another version of the interface.
        raise _NoKernelsError(f"{path}: {error}") from None
