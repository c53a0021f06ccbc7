"""Small programs with known answers, run through JAX."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A small program with a known answer."""

    name: str
    passed: bool
    detail: str
    """What is wrong, "" if nothing is."""


def run_checks() -> list[Check]:
    """The small programs, run. All their numbers are whole and exact in their types."""
    return [
        _run("matmul float32", lambda: _check_matmul("float32")),
        _run("matmul bfloat16", lambda: _check_matmul("bfloat16")),
        _run("vmapped mat-vec, then a sum", _check_vmapped_matvec),
    ]


def _run(name: str, check: Callable[[], str]) -> Check:
    """The check's result: it returns what is wrong, "" if nothing is."""
    try:
        wrong = check()
    except Exception as error:  # a driver or compiler that fails can raise anything
        wrong = f"{type(error).__name__}: {error}"
    return Check(name=name, passed=not wrong, detail=wrong)


def _check_matmul(dtype: str) -> str:
    """Against numpy's integer product; entries within -2 .. 2, so that bfloat16 holds them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    i, k = np.arange(96)[:, None], np.arange(128)[None, :]
    left, right = (7 * i + 3 * k) % 5 - 2, (5 * k.T + i.T * 11) % 5 - 2

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    found = np.asarray(product(jnp.asarray(left, dtype), jnp.asarray(right, dtype)))
    wrong = int((found != left @ right).sum())
    return f"{wrong} of {found.size} entries differ from numpy's" if wrong else ""


def _check_vmapped_matvec() -> str:
    """JAX 0.10.2 is wrong here on a CPU without its flag: jax issue 39103."""
    import jax
    import jax.numpy as jnp

    count = 32_769  # the first size that was wrong
    first = jnp.arange(count, dtype="float32")
    rows = jnp.stack((first, jnp.zeros_like(first), jnp.zeros_like(first)), axis=1)
    matrix = jnp.eye(3, dtype="float32")

    @jax.jit
    @jax.vmap
    def squared_length(row: jax.Array) -> jax.Array:
        return jnp.sum((matrix @ row) ** 2)

    found, expected = float(squared_length(rows)[-1]), float((count - 1) ** 2)
    return f"{found:.0f} instead of {expected:.0f}" if found != expected else ""
