"""The tables of docs/pods.md, from a result of bench/pods.py."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from meshlm.planning.hlo import Collective

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "pods.md"
ROW = dict[str, Any]
# The original on v3-32, by its benchmarks.md, and on v3-256, by its author's account.
PUBLISHED_STEP_S, PUBLISHED_PARTS = 3.373, 8
PUBLISHED_TOKENS_PER_S = 151_000
AIM = 0.7


def latest_result() -> Path | None:
    """The newest result that is kept; None where there is none."""
    return max(RESULTS.glob("pods-*.json"), default=None)


def write_page(result: dict[str, Any]) -> None:
    """Puts the tables of a result between their marks in the page."""
    PAGE.write_text(fill(PAGE.read_text(), result))


def fill(page: str, result: dict[str, Any]) -> str:
    """The page with the tables of a result between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, (make, needs) in TABLES.items():
        missing = [section for section in needs if section not in result]
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}\n{_not_made(missing) if missing else make(result)}\n{end}"
        page, count = pattern.subn(lambda _, text=text: text, page)
        assert count == 1, f"{PAGE.name} has {count} places for {name}"
    return page


def _not_made(sections: list[str]) -> str:
    return f"Not made yet: `python bench/pods.py --only {' '.join(sections)}`"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plans(result: dict[str, Any], section: str) -> list[ROW]:
    return result[section]["plans"]


# A step in words.


def way(plan: ROW) -> str:
    """How a step is computed: `fsdp 256, full, 1 part`."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    parts = plan["accumulate"]
    return f"{plan['sharding']}: {mesh}; remat {plan['compute']['remat']}; {count(parts, 'part')}"


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 100e9 else f"{size / 1e9:.0f}"


def peak(plan: ROW) -> str:
    return f"{plan['peak_flops_per_s'] / 1e12:g}"


def wire(plan: ROW) -> dict[tuple[str, str], tuple[int, float]]:
    """By operation and axes: executions, and bytes that a device sends, a step."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for found in plan["compiled"]["collectives"]:
        one = Collective(**{**found, "axes": tuple(found["axes"])})
        key = (one.op, "+".join(one.axes) or "none")
        counts[key] += one.count
        sizes[key] += one.count * one.wire_bytes
    return {key: (counts[key], sizes[key]) for key in counts}


def total_wire(plan: ROW) -> float:
    return sum(size for _, size in wire(plan).values())


# The tables.


def versions(result: dict[str, Any]) -> str:
    sections = [value for value in result.values() if isinstance(value, dict)]
    dates = sorted({section["date"][:10] for section in sections})
    tools = sorted({f"JAX {s['jax']} with libtpu {s['libtpu']}" for s in sections})
    return f"Predicted on {', '.join(dates)} with {', '.join(tools)}. Nothing here was measured."


def comparison(result: dict[str, Any]) -> str:
    """The original's step and ours on the same pod: memory, wire, time."""
    (theirs,) = plans(result, "original")
    head = (
        "step", "peak memory, GB", "of the original", "on the wire, GB", "of the original",
        "predicted step, s", "of the original", "predicted MFU", "tokens/s",
    )  # fmt: skip
    rows = [_compared(plan, theirs) for plan in (theirs, *plans(result, "ours"))]
    return table(head, rows)


def _compared(plan: ROW, theirs: ROW) -> list[str]:
    def ratio(of: Callable[[ROW], float]) -> str:
        return "" if plan is theirs else f"{of(plan) / of(theirs):.2f}"

    return [
        ("the original: " if plan is theirs else "") + way(plan),
        gb(plan["peak_bytes"]),
        ratio(lambda p: p["peak_bytes"]),
        gb(total_wire(plan)),
        ratio(total_wire),
        f"{plan['predicted_step_s']:.2f}",
        ratio(lambda p: p["predicted_step_s"]),
        f"{plan['predicted_mfu']:.1%} of {peak(plan)} TFLOP/s",
        f"{plan['predicted_tokens_per_s']:,.0f}",
    ]


def verdict(result: dict[str, Any]) -> str:
    """What was aimed at, and what is predicted."""
    (theirs,) = plans(result, "original")
    ours = plans(result, "ours")

    def memory(plan: ROW) -> float:
        return plan["peak_bytes"] / theirs["peak_bytes"]

    def time(plan: ROW) -> float:
        return plan["predicted_step_s"] / theirs["predicted_step_s"]

    smallest, fastest = min(ours, key=memory), min(ours, key=time)
    both = min(ours, key=lambda plan: max(memory(plan), time(plan)))
    rows = [
        [f"peak memory {AIM}", f"{memory(smallest):.2f}", way(smallest)],
        [f"predicted step {AIM}", f"{time(fastest):.2f}", way(fastest)],
        [f"both {AIM}, by one step", f"{memory(both):.2f} and {time(both):.2f}", way(both)],
    ]
    reached = (memory(smallest), time(fastest), max(memory(both), time(both)))
    answers = ["yes" if value <= AIM else "no" for value in reached]
    head = ("at most, of the original's", "predicted", "by", "reached")
    return table(head, ([*row, answer] for row, answer in zip(rows, answers, strict=True)))


def published(result: dict[str, Any]) -> str:
    """The original's predicted time next to those that were measured in its time."""
    (theirs,) = plans(result, "original")
    step_s, tokens_per_s = theirs["predicted_step_s"], theirs["predicted_tokens_per_s"]
    half = theirs["accumulate"] // PUBLISHED_PARTS
    return table(
        ("the original, measured", "predicted here", "error"),
        [
            [
                f"{PUBLISHED_PARTS} parts on 32 cores: {PUBLISHED_STEP_S} s (its benchmarks.md)",
                f"{step_s / half:.2f} s for as many of the {theirs['accumulate']}",
                f"{step_s / half / PUBLISHED_STEP_S - 1:+.0%}",
            ],
            [
                f"256 cores: about {PUBLISHED_TOKENS_PER_S:,} tokens/s (its author's account)",
                f"{tokens_per_s:,.0f} tokens/s",
                f"{PUBLISHED_TOKENS_PER_S / tokens_per_s - 1:+.0%}",
            ],
        ],
    )


def traffic(result: dict[str, Any]) -> str:
    """What travels, by operation and mesh axes, side by side."""
    columns = [*plans(result, "original"), *plans(result, "ours")]
    by_plan = [wire(plan) for plan in columns]
    keys = sorted({key for found in by_plan for key in found}, key=lambda k: (k[1], k[0]))
    rows = []
    for op, axes in keys:
        cells = [found.get((op, axes)) for found in by_plan]
        shown = ["" if c is None else f"{gb(c[1])} in {c[0]:,}" for c in cells]
        rows.append([f"{op} over {axes}", *shown])
    rows.append(["**sum**", *(gb(total_wire(plan)) for plan in columns)])
    names = ["the original", *(way(plan) for plan in columns[1:])]
    return table(["GB that a device sends, in how many exchanges", *names], rows)


def times(result: dict[str, Any]) -> str:
    """What the predicted steps consist of."""
    head = (
        "step", "FLOPs of a device", "of the model's", "products, s", "memory, s",
        "exchanges, s", "of these waited for, s", "predicted step, s",
    )  # fmt: skip
    rows = []
    for plan in (*plans(result, "original"), *plans(result, "ours")):
        rows.append(
            [
                ("the original: " if plan["sharding"] == "tensor" else "") + way(plan),
                f"{plan['flops']:.3g}",
                f"{plan['flops'] / plan['model_flops']:.2f}",
                f"{plan['predicted_compute_s']:.2f}",
                f"{plan['predicted_hbm_s']:.2f}",
                f"{sum(plan['predicted_interconnect_s'].values()):.2f}",
                f"{plan['predicted_exposed_s']:.2f}",
                f"{plan['predicted_step_s']:.2f}",
            ]
        )
    return table(head, rows)


def fleet(result: dict[str, Any]) -> str:
    """Ours on every pod."""
    head = (
        "model", "pod", "devices", "sequences", "step", "peak memory, GB", "on the wire, GB",
        "predicted step, s", "tokens/s", "predicted MFU", "compiled in, s",
    )  # fmt: skip
    ours = plans(result, "ours")
    best = min(ours, key=lambda p: p["predicted_step_s"])
    rows = [
        [
            f"{plan['preset']}, {plan['parameters'] / 1e9:.2f}e9 parameters",
            f"{plan['device_kind']}, {plan['topology']}",
            str(plan["devices"]),
            str(plan["batch_size"]),
            way(plan),
            gb(plan["peak_bytes"]),
            gb(total_wire(plan)),
            f"{plan['predicted_step_s']:.2f}",
            f"{plan['predicted_tokens_per_s']:,.0f}",
            f"{plan['predicted_mfu']:.1%} of {peak(plan)} TFLOP/s",
            f"{plan['compile_s']:.0f}",
        ]
        for plan in (best, *plans(result, "pods"))
    ]
    return table(head, rows)


def depths(result: dict[str, Any]) -> str:
    """How long compiling takes, by the number of layers."""
    steps = [("MeshLM", "depth", plan) for plan in plans(result, "depth")]
    steps += [("the original, unrolled", "original", plan) for plan in plans(result, "original")]
    rows = [
        [
            name,
            str(plan["layers"]),
            f"{plan['lower_s']:.1f}",
            f"{plan['compile_s']:.0f}",
            str(result[section]["cores"]),
        ]
        for name, section, plan in steps
    ]
    return table(("step", "layers", "traced in, s", "compiled in, s", "cores"), rows)


# Each with the sections of a result that it is made from.
TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], tuple[str, ...]]] = {
    "versions": (versions, ()),
    "comparison": (comparison, ("original", "ours")),
    "verdict": (verdict, ("original", "ours")),
    "published": (published, ("original",)),
    "times": (times, ("original", "ours")),
    "traffic": (traffic, ("original", "ours")),
    "fleet": (fleet, ("ours", "pods")),
    "depths": (depths, ("original", "depth")),
}


if __name__ == "__main__":
    newest = latest_result()
    assert newest is not None
    write_page(json.loads(newest.read_text()))
