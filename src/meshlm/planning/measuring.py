"""How fast this machine's CPU is: there is no data sheet of it that would hold."""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from meshlm.core.platform import DeviceFacts

_SIDE = 1024
_BYTES = 128 << 20
_TIMES = 3


def measured_cpu(facts: DeviceFacts, dtype: str) -> DeviceFacts:
    """Returns the facts of one of a CPU's devices, which share its cores and memory.

    They are shared among this process's devices. Several processes on one host share it too, which
    none of them knows: each then has less.

    Args:
        facts: what is known without a look.
        dtype: of the products' operands; bfloat16 and float32 differ by a factor of up to five.
    """
    flops, bandwidth = _speeds(dtype)
    devices = jax.local_device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return dataclasses.replace(
        facts,
        peak_flops=flops / devices,
        bandwidth_bytes_per_s=bandwidth / devices,
        memory_bytes=memory // devices,
    )


@functools.cache
def _speeds(dtype: str) -> tuple[float, float]:
    """Returns (FLOP/s of a product of square matrices, bytes/s of a copy)."""
    device = jax.local_devices()[0]
    with jax.default_device(device):
        a, b = (jnp.ones((_SIDE, _SIDE), dtype) for _ in range(2))
        product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
        numbers = jnp.ones(_BYTES // 4, jnp.float32)
        copy = jax.jit(lambda x: x + 1)
        product_s, copy_s = _seconds(lambda: product(a, b)), _seconds(lambda: copy(numbers))
    return 2.0 * _SIDE**3 / product_s, 2.0 * _BYTES / copy_s


def _seconds(run: Callable[[], jax.Array]) -> float:
    times_s = []
    for _ in range(1 + _TIMES):
        began_s = time.perf_counter()
        jax.block_until_ready(run())
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[1:])
