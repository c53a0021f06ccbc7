"""The plan against the first steps of a run: what was predicted, what was measured, how far off."""

import logging
import statistics

import jax

from meshlm.planning.plan import Plan, make_plan
from meshlm.planning.setup import Setup
from meshlm.planning.topology import find_topology

_log = logging.getLogger(__name__)
# The first step compiles, the second may still wait for the host.
_UNCOUNTED = 2
_COUNTED = 5


class PlanCheck:
    """Takes the times of a run's first steps and gives one line on them, once."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan
        self.seen = 0
        self.times_s: list[float] = []

    def add(self, step_s: float) -> str | None:
        """Returns the line to log when the last of the steps was added; None before and after."""
        self.seen += 1
        if self.plan is None or not _UNCOUNTED < self.seen <= _UNCOUNTED + _COUNTED:
            return None
        self.times_s.append(step_s)
        if len(self.times_s) < _COUNTED:
            return None
        return compare(self.plan, statistics.median(self.times_s), measured_peak_bytes())


def check_here(setup: Setup) -> PlanCheck:
    """Returns the check of a run on this machine's devices; it says nothing where none can be."""
    try:
        plan = make_plan(setup, find_topology("here", setup.step.compute.dtype), compile=False)
    except Exception:  # a run neither ends nor is refused for want of a plan
        _log.debug("no plan was made of this run", exc_info=True)
        plan = None
    return PlanCheck(plan)


def compare(plan: Plan, step_s: float, peak_bytes: int | None) -> str:
    """Returns a line on the prediction's errors, or on what was measured where none was made.

    Args:
        plan: by formula or by the compiler.
        step_s: the measured seconds of a step.
        peak_bytes: the most of a device's memory that was in use; None where it is not told.
    """
    if plan.prediction is None:
        pace = plan.model_flops / step_s
        parts = [
            f"no step is predicted for {plan.topology.device_kind}, of which no data sheet is "
            f"known; measured {step_s:.3g} s, {pace / 1e9:,.1f} GFLOP/s a device"
        ]
    else:
        predicted_s = plan.prediction.step_s
        parts = [
            f"step predicted {predicted_s:.3g} s, measured {step_s:.3g} s "
            f"({_error(predicted_s, step_s)})"
        ]
    if peak_bytes:
        parts.append(
            f"memory predicted {plan.peak_bytes / 1e9:.2f} GB a device, measured "
            f"{peak_bytes / 1e9:.2f} GB ({_error(plan.peak_bytes, peak_bytes)})"
        )
    return f"plan: {'; '.join(parts)}"


def _error(predicted: float, measured: float) -> str:
    return f"error {predicted / measured - 1:+.0%}"


def measured_peak_bytes() -> int | None:
    """Returns the most bytes that were in use on this process's first device, where it tells."""
    told = jax.local_devices()[0].memory_stats()
    return None if told is None else told.get("peak_bytes_in_use")
