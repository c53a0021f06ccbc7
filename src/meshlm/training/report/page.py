"""The report's page: a record in, HTML out. Every text of the run is escaped here."""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import Any

from meshlm.training.report.chart import Chart, Series, chart_html
from meshlm.training.report.record import Record, Sample, flatten, is_number

_SHOWN_SAMPLES = 4
_MAX_SAMPLES = 60
_MAX_INCIDENTS = 200
_MAX_MARKS = 40


def page_html(record: Record) -> str:
    """The whole page as text."""
    style, script = _part("style.css"), _part("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script may run, whatever the samples say; and nothing may be fetched.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = "".join(
        (
            _header(record),
            _tiles(record),
            _charts(record),
            _samples(record.samples),
            _incidents(record),
            _tables("Configuration", record.config),
            _tables("Environment", record.environment),
            _footer(),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(record.name)} · MeshLM</title><style>{style}</style></head>"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


def _part(name: str) -> str:
    return resources.files("meshlm.training.report").joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    """Escaped text, with control characters replaced by their visible pictures."""
    visible = re.sub(r"[\0-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), str(value))
    return escape(visible.replace("\x7f", "␡"))


def _header(record: Record) -> str:
    planned, status = record.planned_steps, record.status
    where = f"step {record.last_step:,}"
    bar = ""
    if planned is not None:
        where += f" of {planned:,}"
        done = min(1.0, record.last_step / planned)
        bar = f'<span class="bar"><i style="width:{done:.1%}"></i></span>'
    return (
        f'<header><p class="where">MeshLM training run</p><h1>{_text(record.name)}</h1>'
        f'<div class="progress"><span class="status {status.replace(" ", "-")}">'
        f"{status.capitalize()}</span>{bar}<span>{where}</span></div></header>"
    )


def _tiles(record: Record) -> str:
    loss, validation = record.points("loss"), record.points("val_loss")
    bits, tokens = record.points("val_bits_per_byte"), record.points("tokens")
    speed, utilisation = record.points("tokens_per_s"), record.points("mfu")
    tiles = []
    if loss:
        tiles.append(
            (
                "Final loss" if record.status == "finished" else "Training loss",
                _fixed(loss[-1][1], 3),
                "",
                "nats a token",
            )
        )
    if validation:
        step, best = min(validation, key=lambda point: point[1])
        tiles.append(("Best validation loss", _fixed(best, 3), "", f"at step {step:,.0f}"))
    if bits:
        step, best = min(bits, key=lambda point: point[1])
        tiles.append(("Bits per byte", _fixed(best, 3), "", f"best, at step {step:,.0f}"))
    if tokens:
        tiles.append(("Tokens seen", *_large(tokens[-1][1]), ""))
    if speed:
        median = sorted(value for _, value in speed)[len(speed) // 2]
        below = f"MFU {utilisation[-1][1]:.1%}" if utilisation else "median"
        tiles.append(("Throughput", f"{median:,.0f}", "tokens/s", below))
    if record.training_s > 0:
        tiles.append(("Training time", *_duration(record.training_s), ""))
    if not tiles:
        return ""
    quote = '"'
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{unit}</small>' if unit else ''}"
        f"{f'<span class={quote}sub{quote}>{sub}</span>' if sub else ''}</dd></div>"
        for name, value, unit, sub in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _large(number: float) -> tuple[str, str]:
    """A count as (value, unit), to four digits."""
    for size, unit in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.4g}", unit
    return f"{number:,.0f}", ""


def _duration(seconds: float) -> tuple[str, str]:
    """A duration as (value, unit) in the largest unit that fits."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f}", unit
    return f"{seconds:.1f}", "s"


def _hero(record: Record) -> Chart:
    series = [
        Series(name="training", points=record.points("loss"), smooth=True),
        Series(name="validation", points=record.points("val_loss"), color=1, dots=True),
    ]
    note = ""
    if len(series[0].points) >= 50:
        note = "Faint: each measured step. Bold: its running average."
    return Chart(title="Loss", unit="nats a token", series=series, note=note)


def _small_charts(record: Record) -> list[Chart]:
    def line(key: str, name: str, **options: Any) -> Series:
        return Series(name=name, points=record.points(key), **options)

    step_ms = [(step, 1000 * value) for step, value in record.points("step_s")]
    wait_ms = [(step, 1000 * value) for step, value in record.points("data_wait_s")]
    times = [
        Series(name="whole step", points=step_ms),
        Series(name="waiting for data", points=wait_ms, color=1),
    ]
    bits = line("val_bits_per_byte", "bits per byte", color=1, dots=True)
    perplexity = line("val_perplexity", "perplexity", color=1, dots=True)
    usage = [(step, 100 * value) for step, value in record.points("mfu")]
    return [
        Chart(title="Validation bits per byte", unit="bits", series=[bits]),
        Chart(title="Validation perplexity", unit="", series=[perplexity], log_y=True),
        Chart(
            title="Learning rate",
            unit="",
            series=[line("learning_rate", "learning rate")],
            from_zero=True,
        ),
        Chart(
            title="Gradient norm",
            unit="before clipping",
            series=[line("grad_norm", "norm", smooth=True)],
            from_zero=True,
            log_y=True,
        ),
        Chart(
            title="Throughput",
            unit="tokens/s",
            series=[line("tokens_per_s", "tokens/s", color=2, smooth=True)],
            from_zero=True,
        ),
        Chart(title="Step time", unit="ms", series=times, from_zero=True),
        Chart(
            title="Model FLOPs utilisation",
            unit="% of peak",
            series=[Series(name="MFU", points=usage, color=2)],
            from_zero=True,
            note="Tokens/s x (6 P + 6 L T N H) FLOPs a token / the devices' bf16 peak.",
        ),
        Chart(
            title="Gradient noise scale",
            unit="sequences",
            series=[line("grad_noise_scale", "sequences")],
            log_y=True,
            note="Batches well below it gain almost linearly from growing; above it, little.",
        ),
    ]


def _charts(record: Record) -> str:
    marks = [
        (float(one.step), one.kind, f"{one.kind} at step {one.step:,}")
        for one in record.incidents[:_MAX_MARKS]
    ]
    last = float(record.last_step)
    hero = chart_html(_hero(record), last_step=last, marks=marks, choose_log_x=True)
    small = "".join(chart_html(chart, last_step=last) for chart in _small_charts(record))
    if not hero and not small:
        return '<p class="empty">No metrics yet.</p>'
    return f'<div class="hero">{hero}</div><div class="charts">{small}</div>'


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    blocks = "".join(_prompt(prompt, group) for prompt, group in by_prompt.items())
    return f"<h2>Samples over time</h2>{blocks}"


def _prompt(prompt: str, samples: Sequence[Sample]) -> str:
    shown = _spread(samples, _SHOWN_SAMPLES)
    html = "".join(map(_sample, shown))
    if len(samples) > len(shown):
        every = _spread(samples, _MAX_SAMPLES)
        label = "All" if len(every) == len(samples) else f"{len(every)} of"
        rows = "".join(map(_sample, every))
        html += f"<details><summary>{label} {len(samples):,} samples</summary>{rows}</details>"
    title = _text(prompt.strip()) if prompt.strip() else "(no prompt)"
    return f'<div class="prompt"><h3>{title}</h3>{html}</div>'


def _spread(samples: Sequence[Sample], wanted: int) -> list[Sample]:
    """The first, the last and evenly spaced ones between, in order."""
    if len(samples) <= wanted:
        return list(samples)
    return [samples[i * (len(samples) - 1) // (wanted - 1)] for i in range(wanted)]


def _sample(sample: Sample) -> str:
    return (
        f'<div class="sample"><span>step {sample.step:,}</span>'
        f'<pre dir="auto">{_text(sample.text)}</pre></div>'
    )


def _incidents(record: Record) -> str:
    if not record.lines and not record.incidents:
        return ""
    if not record.incidents:
        return '<h2>Incidents</h2><p class="empty">None: every step was an ordinary one.</p>'
    rows = "".join(
        f"<tr><td>step {one.step:,}</td><td>{_text(one.kind)}</td>"
        f"<td>{_text(one.message)}</td></tr>"
        for one in record.incidents[:_MAX_INCIDENTS]
    )
    more = len(record.incidents) - _MAX_INCIDENTS
    rest = f'<p class="empty">and {more:,} more.</p>' if more > 0 else ""
    return f'<h2>Incidents</h2><table class="incidents">{rows}</table>{rest}'


def _tables(title: str, values: Mapping[str, Any]) -> str:
    """Nested values as one small table a group, top-level leaves first."""
    if not values:
        return ""
    groups: dict[str, list[tuple[str, Any]]] = {"": []}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            groups[key] = list(flatten(value))
        else:
            groups[""].append((key, value))
    tables = "".join(_table(name, rows) for name, rows in groups.items() if rows)
    return f'<h2>{title}</h2><div class="tables">{tables}</div>'


def _table(name: str, rows: Iterable[tuple[str, Any]]) -> str:
    heading = f"<h3>{_text(name)}</h3>" if name else ""
    body = "".join(f"<tr><td>{_text(k)}</td><td>{_text(_shown(v))}</td></tr>" for k, v in rows)
    return f"<section>{heading}<table>{body}</table></section>"


def _shown(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if is_number(value):
        return f"{value:g}"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _footer() -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<footer>Written by MeshLM at {written} from <code>metrics.jsonl</code>, "
        "<code>config.json</code> and <code>samples/</code> beside this file.</footer>"
    )
