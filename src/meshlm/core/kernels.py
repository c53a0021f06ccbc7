"""Building and loading of kernels in C, compiled on the user's machine where there is a compiler.

Nothing has to be compiled to install MeshLM, and everything works without: XLA then computes the
same, slower. A library lies in a folder that only the user may write to, under a hash of all that
it depends on, and is built once.
"""

import ctypes
import dataclasses
import functools
import hashlib
import importlib.resources
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from meshlm.core.errors import UsageError
from meshlm.core.private_folder import private_folder

_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-w",
)
_COMPILE_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelLibrary:
    """C sources that are compiled together, and the calls that XLA finds in the result."""

    package: str
    """Where the sources lie."""
    sources: tuple[str, ...]
    """File names; those in `.c` are compiled, the others are included by them."""
    targets: tuple[str, ...]
    """Functions of XLA's foreign function interface, registered under their own names."""
    switch: str
    """The environment variable that turns the library off, with the value `off`."""

    def paths(self) -> list[Path]:
        """Returns the sources' paths."""
        folder = Path(str(importlib.resources.files(self.package)))
        return [folder / name for name in self.sources]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Whether a library's kernels can be called."""

    ready: bool
    detail: str
    """The library's path, or why there is none."""


# Several threads may trace at once.
_lock = threading.Lock()


class _NoKernelsError(Exception):
    """Why they cannot be had."""


def load_kernels(library: KernelLibrary) -> Kernels:
    """Returns whether the kernels are there; compiles and registers them the first time."""
    with _lock:
        return _load(library)


@functools.cache
def _load(library: KernelLibrary) -> Kernels:
    try:
        if os.environ.get(library.switch) == "off":
            raise _NoKernelsError(f"{library.switch}=off")
        path = _build(library)
        _register(library, path)
    except (_NoKernelsError, UsageError, OSError, subprocess.SubprocessError) as error:
        return Kernels(ready=False, detail=str(error))
    return Kernels(ready=True, detail=str(path))


def _build(library: KernelLibrary) -> Path:
    """Returns the compiled library's path, after building it where it is not there yet."""
    import jax

    compiler = shutil.which("cc")
    if compiler is None:
        raise _NoKernelsError("there is no C compiler (cc) on PATH")
    sources = [path.read_bytes() for path in library.paths()]
    include = Path(jax.ffi.include_dir())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=10).stdout
    parts = (*sources, (include / "xla/ffi/api/c_api.h").read_bytes(), version, _processor())
    key = hashlib.sha256(b"\0".join((*parts, " ".join(_FLAGS).encode()))).hexdigest()[:32]
    folder = private_folder("kernels")
    if folder is None:
        raise _NoKernelsError("the user has no cache folder that can be written: XDG_CACHE_HOME")
    path = folder / f"kernels-{key}.so"
    if not path.exists():
        _compile(compiler, library, include, path)
    return path


def _processor() -> bytes:
    """Returns what -march=native depends on: the processor's name and what it can do."""
    lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(line for line in lines if line.startswith(names))


def _compile(compiler: str, library: KernelLibrary, include: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        built = Path(name) / "kernels.so"
        ran = subprocess.run(
            [
                compiler,
                *_FLAGS,
                "-fPIC",
                "-shared",
                f"-I{include}",
                *(str(source) for source in library.paths() if source.suffix == ".c"),
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


def _register(library: KernelLibrary, path: Path) -> None:
    import jax

    loaded = ctypes.CDLL(str(path))
    try:
        for name in library.targets:
            target = jax.ffi.pycapsule(getattr(loaded, name))
            jax.ffi.register_ffi_target(name, target, platform="cpu")
    except (AttributeError, RuntimeError, ValueError) as error:
        # A symbol is missing, or JAX does not take it: of another version of the interface.
        raise _NoKernelsError(f"{path}: {error}") from None
