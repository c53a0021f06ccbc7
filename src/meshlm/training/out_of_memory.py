"""A run that has no memory left: what is said of it, with the plan's numbers and what to change."""

import contextlib
from collections.abc import Iterator

import jax

from meshlm.core.errors import MeshLMError
from meshlm.core.platform import device_facts
from meshlm.planning.memory import estimate_memory
from meshlm.planning.setup import Setup


@contextlib.contextmanager
def told_out_of_memory(setup: Setup) -> Iterator[None]:
    """Raises MeshLMError in place of JAX's and Python's errors for want of memory.

    A process that the kernel ends because it took too much says nothing more.
    """
    try:
        yield
    except MemoryError as error:
        raise MeshLMError(_explain(setup, str(error))) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MeshLMError(_explain(setup, str(error))) from error


def _explain(setup: Setup, reason: str) -> str:
    """Returns one line: what was wanted, what a step needs by the formula, and the remedies."""
    needed, facts = estimate_memory(setup), device_facts()
    parts = {
        "weights": needed.weights_bytes,
        "optimizer": needed.optimizer_bytes,
        "gradients": needed.gradients_bytes,
        "activations": needed.activations_bytes,
    }
    listed = ", ".join(f"{name} {number / 1e9:,.3g}" for name, number in parts.items())
    has = "" if facts.memory_bytes is None else f" and it has {facts.memory_bytes / 1e9:,.3g}"
    said = reason.split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ") or "no memory on the host"
    return (
        f"out of memory on {facts.kind} ({said[:200]}); by the plan's formula a step needs "
        f"{needed.total_bytes / 1e9:,.3g} GB of a device ({listed}){has}: {_remedies(setup)}; "
        "the checkpoints are as they were"
    )


def _remedies(setup: Setup) -> str:
    now = ["more devices by --mesh.*"]
    if setup.step.compute.remat != "full":
        now.insert(0, "--remat full")
    new = ["more --accumulate", "a smaller --batch-size"]
    if setup.step.optimizer.name == "adamw":
        new.append("--optimizer adafactor")
    return f"go on with {' or '.join(now)}, or begin a run with {' or '.join(new)}"
