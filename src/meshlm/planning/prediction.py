"""How long a step will take: a prediction from counted work and data sheets.

    step = products / (efficiency x peak) + traffic / bandwidth + exchanges that must be waited for

Exchanges that the compiled program runs beside products hide behind the rest, as far as that is
long enough; the others are waited for. The efficiency is the model's one fitted number
(planning/calibration.py).
"""

import dataclasses
import math

from meshlm.core.errors import UsageError
from meshlm.core.platform import DeviceFacts
from meshlm.core.sharding import Axes
from meshlm.model.flops import flops_per_token
from meshlm.planning.compiling import Compiled
from meshlm.planning.links import transfer_s
from meshlm.planning.setup import Setup
from meshlm.planning.topology import Topology
from meshlm.planning.work import FORMS, Transfer, Work, count_work

# Share of the peak at which matrix products run: fitted to the four published runs of
# planning/calibration.py, the same for every device.
PRODUCT_EFFICIENCY = 0.8
# Rows and columns of a chip's matrix unit where they are not 128. Source: Google's TPU v6e pages.
_UNIT_WIDTHS = {"TPU v6 lite": 256, "TPU v6e": 256, "TPU7x": 256}
_UNIT_WIDTH = 128
# Of what is no TPU: a CPU's vectors, and the pieces that a GPU's tensor cores multiply.
_SMALL_WIDTH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The time of one step, predicted: nothing of it was measured."""

    step_s: float
    mfu: float
    """Model FLOPs (model/flops.py) over what all devices could do at their peak, 0 to 1."""
    tokens_per_s: float
    """Of all devices."""
    peak_flops_per_s: float
    """Of one device, by its data sheet: what `mfu` relates to."""
    model_flops: float
    """Of one device's share of the step: without recomputation."""
    compute_s: float
    """Products."""
    hbm_s: float
    """Memory traffic outside of the products."""
    interconnect_s: dict[str, float]
    """By mesh axes, as data or replica+data: all exchanges, hidden ones included."""
    exposed_s: float
    """The part of the exchanges that adds to the step."""
    assumptions: tuple[str, ...]


def predict(setup: Setup, topology: Topology, compiled: Compiled | None = None) -> Prediction:
    """Returns how long a step will take, with exchanges from the compiled step where there is one.

    Raises:
        UsageError: the device's peak or bandwidth is not known.
    """
    work = count_work(setup)
    by_compiler = compiled is not None and compiled.fits
    if compiled is not None and by_compiler:
        work = _from_compiled(setup, work, compiled, topology.facts)
    return predict_work(setup, topology, work, from_compiler=by_compiler)


def _from_compiled(setup: Setup, work: Work, compiled: Compiled, facts: DeviceFacts) -> Work:
    """Returns the work with what the compiled step tells better: FLOPs, traffic and exchanges.

    Of the traffic of products only what they do not hide counts.
    """
    peak, bandwidth = _known(facts)
    summed = {*setup.rules.heads, *setup.rules.vocab}
    transfers = tuple(
        Transfer(
            op=found.op,
            axes=found.axes,
            bytes=found.bytes,
            count=found.count,
            of="activations" if set(found.axes) <= summed else "weights",
            overlapped=found.overlapped,
            group=found.group_size,
            between_slices=found.between_slices,
        )
        for found in compiled.collectives
    )
    beside = (max(0.0, t.bytes - t.flops * bandwidth / peak) for t in compiled.traffic)
    return dataclasses.replace(
        work,
        product_flops=compiled.flops - (0.0 if _is_kernel(setup) else work.attention_flops),
        traffic_bytes=math.fsum(beside) if compiled.traffic else work.traffic_bytes,
        transfers=transfers,
    )


def _is_kernel(setup: Setup) -> bool:
    """True where attention is a kernel, of whose FLOPs the compiled program does not tell."""
    return not FORMS[setup.step.compute.attention].stores_scores


def executed_flops(setup: Setup, work: Work, compiled: Compiled | None) -> float:
    """Returns the FLOPs of all products on one device: the compiler's, with the formula's for a
    kernel, or the formula's."""
    if compiled is None or not compiled.fits:
        return work.product_flops + work.attention_flops
    return compiled.flops + (work.attention_flops if _is_kernel(setup) else 0.0)


def predict_work(
    setup: Setup, topology: Topology, work: Work, *, from_compiler: bool = False
) -> Prediction:
    """Returns how long a step with this work will take.

    Raises:
        UsageError: the device's peak or bandwidth is not known.
    """
    facts = topology.facts
    peak, bandwidth = _known(facts)
    compute = work.product_flops + work.attention_flops * _padding(work.head_dim, facts.kind)
    compute_s = compute / (PRODUCT_EFFICIENCY * peak)
    hbm_s = work.traffic_bytes / bandwidth
    by_axes, hidden_s, waited_s = _exchanges(setup, topology, work)
    exposed_s = waited_s + max(0.0, hidden_s - compute_s - hbm_s)
    step_s = compute_s + hbm_s + exposed_s
    model = flops_per_token(setup.step.model, setup.seq_len) * setup.tokens
    devices = setup.mesh.num_devices
    return Prediction(
        step_s=step_s,
        mfu=model / (step_s * peak * devices),
        tokens_per_s=setup.tokens / step_s,
        peak_flops_per_s=peak,
        model_flops=model / devices,
        compute_s=compute_s,
        hbm_s=hbm_s,
        interconnect_s=by_axes,
        exposed_s=exposed_s,
        assumptions=_assumptions(topology, from_compiler),
    )


def _known(facts: DeviceFacts) -> tuple[float, float]:
    if facts.peak_flops is None or facts.bandwidth_bytes_per_s is None:
        raise UsageError(
            f"no data sheet is known for {facts.kind}: its steps cannot be predicted; "
            "name a --topology such as v5e:16x16 or H100:8"
        )
    return facts.peak_flops, facts.bandwidth_bytes_per_s


def _padding(head_dim: int, kind: str) -> float:
    """Returns the factor by which a matrix unit wider than a head works in vain."""
    unit = _UNIT_WIDTH if kind.startswith("TPU") else _SMALL_WIDTH
    width = _UNIT_WIDTHS.get(kind, unit)
    return math.ceil(head_dim / width) * width / head_dim


def _exchanges(
    setup: Setup, topology: Topology, work: Work
) -> tuple[dict[str, float], float, float]:
    """Returns (seconds by axes, of those that can hide, of those that are waited for)."""
    by_axes: dict[str, float] = {}
    hidden_s = waited_s = 0.0
    for transfer in work.transfers:
        one = transfer_s(
            transfer.op,
            transfer.bytes,
            transfer.axes,
            setup.mesh,
            topology,
            group=transfer.group,
            between_slices=transfer.between_slices,
        )
        seconds = transfer.count * (one or 0.0)
        name = _axes_name(transfer.axes)
        by_axes[name] = by_axes.get(name, 0.0) + seconds
        if _is_hidden(transfer, topology):
            hidden_s += seconds
        else:
            waited_s += seconds
    return by_axes, hidden_s, waited_s


def _is_hidden(transfer: Transfer, topology: Topology) -> bool:
    """True where an exchange runs beside products: the compiled program says which.

    By formula, as programs come out where nobody sets the compiler's flags: those for v2 and v3
    wait for every exchange, those of later TPUs for all but the gathering of weights and the sums
    of gradients between slices.
    """
    facts = topology.facts
    if transfer.overlapped is not None:
        return transfer.overlapped
    if facts.platform == "tpu":
        between_slices = topology.slices > 1 and transfer.axes == ("replica",)
        beside = transfer.of == "weights" or between_slices
        return beside and facts.kind not in ("TPU v2", "TPU v3")
    return transfer.of != "activations"


def _axes_name(axes: Axes) -> str:
    return "+".join(axes)


def _assumptions(topology: Topology, from_compiler: bool) -> tuple[str, ...]:
    facts = topology.facts
    peak, bandwidth = _known(facts)
    source = "the compiled step" if from_compiler else "formulas, nothing was compiled"
    lines = [
        f"FLOPs, memory traffic and exchanges from {source}",
        f"products at {PRODUCT_EFFICIENCY:.0%} of {peak / 1e12:,.1f} TFLOP/s a device",
        f"memory at {bandwidth / 1e9:,.0f} GB/s",
        "exchanges hide behind products where the compiler overlaps them: "
        + ("as compiled" if from_compiler else _overlaps(topology)),
    ]
    link = topology.interconnect.link_bytes_per_s
    if link is None and topology.num_devices > 1:
        lines.append("exchanges cost nothing here: no speed of the links is known")
    elif link is not None:
        lines.append(f"links of {link / 1e9:,.0f} GB/s each way")
    if topology.slices > 1:
        network = topology.interconnect.network_bytes_per_s
        lines.append(
            "exchanges between slices cost nothing here: no speed of their network is known"
            if network is None
            else f"{network / 1e9:,.3g} GB/s each way from a device to other slices"
        )
    if facts.platform == "cpu":
        lines.append("peak and bandwidth were measured here, a moment ago")
    if facts.platform != "tpu":
        lines.append("the efficiency was fitted to TPUs alone")
    return tuple(lines)


def _overlaps(topology: Topology) -> str:
    facts = topology.facts
    if facts.platform != "tpu":
        return "those of weights and gradients"
    if facts.kind in ("TPU v2", "TPU v3"):
        return "none on v2 and v3"
    return "those of weights" + (" and between slices" if topology.slices > 1 else "")
