"""A plan and a search in words, for a terminal."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from meshlm.model.params import count_params
from meshlm.model.presets import name_of
from meshlm.planning.plan import Plan
from meshlm.planning.search import describe_setup
from meshlm.planning.work import wire_bytes

_GB = 1e9
_MOST_EXCHANGES = 12


def render_plan(plan: Plan) -> str:
    """Returns what the plan says, without its verdict."""
    parts = [_header(plan), _memory(plan), _exchanges(plan), _prediction(plan)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_verdict(plan: Plan, nearest: Plan | None) -> str:
    """Returns `fits`, or `does not fit` with the nearest setup that does, in a line."""
    if plan.fits is None:
        return f"no verdict: the memory of {plan.topology.device_kind} is not known"
    by = "by the compiler" if plan.compiled is not None else "by formula"
    there = plan.available_bytes or 0
    of = f"{plan.peak_bytes / _GB:,.2f} of {there / _GB:,.2f} GB a device, {by}"
    if plan.fits:
        return f"fits: {of}"
    if plan.compiled is not None:
        of = plan.compiled.message or "the compiler found too little memory"
    if nearest is None:
        return f"does not fit: {of}; nothing near it fits on these devices either"
    seconds = nearest.prediction
    pace = "" if seconds is None else f", predicted MFU {seconds.mfu:.1%}"
    return (
        f"does not fit: the nearest that fits is {describe_setup(nearest.setup)} "
        f"({nearest.peak_bytes / _GB:,.2f} GB{pace}); {of}"
    )


def render_search(plans: Sequence[Plan], count: int = 12) -> str:
    """Returns a table of the first plans of a search."""
    rows = [("step s", "MFU", "GB", "from", "options")]
    for plan in plans[:count]:
        found = plan.prediction
        rows.append(
            (
                "?" if found is None else f"{found.step_s:.3g}",
                "?" if found is None else f"{found.mfu:.1%}",
                f"{plan.peak_bytes / _GB:.2f}",
                "formula" if plan.compiled is None else "compiler",
                describe_setup(plan.setup),
            )
        )
    peak = plans[0].prediction.peak_flops_per_s if plans[0].prediction else None
    note = "Predictions, not measurements"
    note += "." if peak is None else f"; MFU of {peak / 1e12:,.1f} TFLOP/s a device."
    return _table(rows, left={3, 4}) + f"\n\n{note} {len(plans)} setups fit.\n"


def _header(plan: Plan) -> str:
    setup, topology, facts = plan.setup, plan.topology, plan.topology.facts
    step, mesh = setup.step, setup.mesh
    known = (
        (facts.peak_flops, 1e12, "TFLOP/s"),
        (facts.bandwidth_bytes_per_s, _GB, "GB/s"),
        (facts.memory_bytes, _GB, "GB"),
    )
    sheet = ", ".join(f"{value / unit:,.1f} {name}" for value, unit, name in known if value)
    return "\n".join(
        (
            f"{name_of(step.model)}: {count_params(step.model):,} parameters on "
            f"{mesh.num_devices} x {topology.device_kind}"
            + (f" in {topology.slices} slices" if topology.slices > 1 else "")
            + (f" ({sheet})" if sheet else ""),
            f"mesh replica {mesh.replica} x data {mesh.data} x model {mesh.model}, "
            f"{setup.sharding}; {setup.batch_size:,} sequences of {setup.seq_len:,} in "
            f"{step.accumulate} {_plural('part', step.accumulate)}: {setup.tokens:,} tokens a step",
            f"{step.compute.dtype}, gradients summed in {step.compute.reduce_dtype}, "
            f"remat {step.compute.remat}, "
            f"attention {step.compute.attention}, {step.optimizer.name}",
        )
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def _memory(plan: Plan) -> str:
    memory, compiled = plan.memory, plan.compiled
    said = compiled if compiled is not None and compiled.fits else None
    rows: list[tuple[str, ...]] = [("bytes on one device", "formula", "compiler")]

    def row(name: str, size: float, found: float | None = None) -> None:
        rows.append((name, _size(size), "" if found is None else _size(found)))

    row("weights", memory.weights_bytes)
    row("optimizer", memory.optimizer_bytes)
    row("batch", memory.batch_bytes)
    row("= arguments", memory.state_bytes, said and said.argument_bytes)
    row("gradients", memory.gradients_bytes)
    row("activations, gathered weights", memory.activations_bytes)
    temporaries = memory.gradients_bytes + memory.activations_bytes
    row("= temporaries", temporaries, said and said.temp_bytes)
    row("peak", memory.total_bytes, said and said.peak_bytes)
    if plan.available_bytes is not None:
        row("available", plan.available_bytes)
    if said is None:
        rows = [columns[:2] for columns in rows]
    return _table(rows, left={0})


def _size(size: float) -> str:
    return f"{size / _GB:,.3f} GB" if size < 100 * _GB else f"{size / _GB:,.0f} GB"


def _exchanges(plan: Plan) -> str:
    """Exchanges of the same kind together, those with the most bytes first."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for op, axes, size, count, group in _each(plan):
        entry = total[op, axes]
        entry[0] += count
        entry[1] += count * wire_bytes(op, size, group)
    if not total:
        return ""
    rows = [("exchanges in a step", "axes", "count", "bytes into a device")]
    ranked = sorted(total.items(), key=lambda item: -item[1][1])
    for (op, axes), (count, size) in ranked[:_MOST_EXCHANGES]:
        rows.append((op, axes, f"{count:,.0f}", _size(size)))
    return _table(rows, left={0, 1})


def _each(plan: Plan) -> Iterable[tuple[str, str, float, float, int]]:
    if plan.compiled is not None and plan.compiled.fits:
        for c in plan.compiled.collectives:
            axes = "+".join(c.axes) or "?"
            axes += " between slices" if c.between_slices else ""
            yield c.op, axes, c.bytes, c.count, c.group_size
    else:
        for t in plan.work.transfers:
            yield t.op, "+".join(t.axes), t.bytes, t.count, plan.setup.mesh.shards(t.axes)


def _prediction(plan: Plan) -> str:
    found = plan.prediction
    if found is None:
        return f"no prediction: no data sheet is known for {plan.topology.device_kind}"
    exchanges = ", ".join(f"{name} {s:.3g} s" for name, s in found.interconnect_s.items())
    lines = [
        "predicted, not measured",
        f"  step {found.step_s:.3g} s, {found.tokens_per_s:,.0f} tokens/s, MFU {found.mfu:.1%} of "
        f"{found.peak_flops_per_s / 1e12:,.1f} TFLOP/s a device",
        f"  products {found.compute_s:.3g} s, memory {found.hbm_s:.3g} s, exchanges "
        f"{exchanges or 'none'} ({found.exposed_s:.3g} s of them are waited for)",
    ]
    lines += [f"  assumed: {line}" for line in found.assumptions]
    compiled = plan.compiled
    if compiled is not None and compiled.fits:
        versions = f"JAX {compiled.jax_version}"
        versions += f", libtpu {compiled.libtpu_version}" if compiled.libtpu_version else ""
        lines.append(f"  compiled in {compiled.compile_s:.0f} s ({versions})")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Returns columns side by side, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
