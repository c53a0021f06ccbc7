"""The library of compiled kernels for decoding on a CPU. Imports no JAX: the doctor asks for it."""

from meshlm.core.kernels import KernelLibrary, Kernels, load_kernels

PRODUCTS = "meshlm_products"
"""The name of the call that multiplies; see calls.c."""

ATTENTION = "meshlm_attention"
"""The name of the call that attends to a cache."""

LIBRARY = KernelLibrary(
    package="meshlm.ops.cpu",
    sources=("kernels.h", "calls.c", "products.c", "attention.c"),
    targets=(PRODUCTS, ATTENTION),
    switch="MESHLM_KERNELS",
)


def kernels() -> Kernels:
    """Returns whether the kernels are there; compiles and registers them the first time."""
    return load_kernels(LIBRARY)
