"""The library of compiled kernels for decoding on a CPU.

Imports no JAX, so that `meshlm doctor` can import it where JAX does not start.
"""

from meshlm.core.kernels import KernelLibrary, Kernels, load_kernels

PRODUCTS = "meshlm_products"
"""The call that computes products; see calls.c."""

ATTENTION = "meshlm_attention"
"""The call that computes attention to a cache."""

LIBRARY = KernelLibrary(
    package="meshlm.ops.cpu",
    sources=("kernels.h", "calls.c", "products.c", "attention.c"),
    targets=(PRODUCTS, ATTENTION),
    switch="MESHLM_KERNELS",
)


def kernels() -> Kernels:
    """Returns whether the kernels are there; compiles and registers them the first time."""
    return load_kernels(LIBRARY)
