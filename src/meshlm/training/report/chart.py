"""One chart as HTML: an SVG that stretches to its box, and labels that stay readable at any width.

The SVG has the unit square as its coordinates (scaled by 1,000) and no text. Strokes do not scale
with it, and labels are HTML placed by percentages, so one drawing serves a phone and a desk.
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

Point = tuple[float, float]

_BUCKETS = 360
_SIZE = 1000
_MARK_LABEL_ROOM = 0.16  # of the width, so that labels do not meet on a phone


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart, its points sorted by x, every value finite."""

    name: str
    points: Sequence[Point]
    color: int = 0
    """Which of the page's series colours."""
    smooth: bool = False
    """Draw the points faintly and their running average over them."""
    dots: bool = False
    """Mark every point: for series that are measured now and then."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn: a title, its unit, and series over the training step."""

    title: str
    unit: str
    series: Sequence[Series]
    from_zero: bool = False
    """Let the vertical axis begin at zero."""
    log_y: bool = False
    """Use a logarithmic vertical axis if the values span a factor of 30 or more."""
    note: str = ""
    """One sentence under the chart."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values and where they fall on the unit interval."""

    low: float
    high: float
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where `value` falls, 0 at `low` and 1 at `high`, held inside."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, self.low)) for v in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the range, about `wanted` of them."""
        return self._log_ticks(wanted) if self.log else self._linear_ticks(wanted)

    def _linear_ticks(self, wanted: int) -> list[float]:
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for multiples in ((1, 2, 5), (1, 3), (1,)):
            values = [m * 10.0**d for d in decades for m in multiples]
            inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(inside) <= wanted + 2:
                break
        every = math.ceil(len(inside) / (wanted + 2))
        return inside[::every] if len(inside) > 1 else self._linear_ticks(wanted)


def downsample(points: Sequence[Point], buckets: int = _BUCKETS) -> list[Point]:
    """At most about 2 `buckets` points with every bucket's lowest and highest, first and last."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        indices = range(
            bucket * len(points) // buckets,
            (bucket + 1) * len(points) // buckets,
        )
        kept.add(min(indices, key=lambda i: points[i][1]))
        kept.add(max(indices, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def running_average(points: Sequence[Point]) -> list[Point]:
    """The mean of each point's neighbourhood, about a fortieth of the series, centred on it.

    A centred mean does not lag behind a falling curve. It narrows at the steep start; at the end,
    where there is nothing to come, it looks back only.
    """
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    half = len(points) // 80
    averaged = []
    for i, (x, _) in enumerate(points):
        start = i - min(half, i)
        stop = min(i + min(half, i) + 1, len(points))
        averaged.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return averaged


def format_value(value: float) -> str:
    """A value to four digits: 1.234, 0.0123, 6e-4, 12,346, 1.23 M."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.2e}".replace(".00e", "e").replace("e-0", "e-")
    for limit, divisor, suffix in ((1e12, 1e12, " T"), (1e9, 1e9, " B"), (1e6, 1e6, " M")):
        if size >= limit:
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    if all(tick % 1000 == 0 for tick in ticks) and 10_000 <= max(ticks, default=0) < 1e6:
        return [f"{tick / 1000:g}k" if tick else "0" for tick in ticks]
    return [format_value(tick) for tick in ticks]


def _y_axis(chart: Chart) -> Axis:
    values = [y for series in chart.series for _, y in series.points]
    low, high = min(values), max(values)
    if chart.log_y and low > 0 and high / low >= 30:
        return Axis(low=low / 1.15, high=high * 1.15, log=True)
    if chart.from_zero:
        low = min(0.0, low)
    span = (high - low) or abs(high) or 1.0
    bottom = low if chart.from_zero and low == 0 else low - 0.06 * span
    return Axis(low=bottom, high=high + 0.06 * span)


def _x_axis(last_step: float, log: bool) -> Axis:
    """From the start of training to `last_step`, so that all charts of a page line up."""
    return Axis(low=1.0 if log else 0.0, high=max(2.0, last_step), log=log)


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    spots = (
        f"{x.fraction(px) * _SIZE:.1f} {(1 - y.fraction(py)) * _SIZE:.1f}" for px, py in points
    )
    return "M" + "L".join(spots)


def _series_svg(series: Series, x: Axis, y: Axis) -> str:
    points = downsample(series.points)
    smooth = series.smooth and len(series.points) >= 50
    lines = []
    if len(points) > 1:
        css = "line faint" if smooth else "line"
        lines.append(f'<path class="{css}" d="{_path(points, x, y)}"/>')
    if smooth:
        average = downsample(running_average(series.points))
        lines.append(f'<path class="line" d="{_path(average, x, y)}"/>')
    if (series.dots and len(points) <= 60) or len(points) == 1:
        # A line of no length with round ends is a circle whatever the stretch.
        spots = "".join(_path([point], x, y) + "h0" for point in points)
        lines.append(f'<path class="dots" d="{spots}"/>')
    return f'<g class="c{series.color}"><title>{escape(series.name)}</title>{"".join(lines)}</g>'


def _hover_data(chart: Chart, x: Axis, y: Axis) -> str:
    """What the page's script needs to show values under the pointer, as an attribute's value."""
    data = {
        "x": [x.low, x.high, x.log],
        "y": [y.low, y.high, y.log],
        "unit": chart.unit,
        "series": [
            {
                "name": series.name,
                "color": series.color,
                "points": [[px, float(f"{py:.6g}")] for px, py in downsample(series.points)],
            }
            for series in chart.series
        ],
    }
    return escape(json.dumps(data, allow_nan=False, separators=(",", ":")))


def _plot(chart: Chart, x: Axis, *, marks: Sequence[tuple[float, str, str]]) -> str:
    y = _y_axis(chart)
    x_ticks = [tick for tick in x.ticks() if tick == int(tick)]
    rows = [1 - y.fraction(tick) for tick in y.ticks()]
    grid = "".join(f"M0 {top * _SIZE:.1f}H{_SIZE}" for top in rows)
    curves = "".join(_series_svg(series, x, y) for series in chart.series)
    y_labels = zip(rows, _tick_labels(y.ticks()), strict=True)
    x_labels = zip(map(x.fraction, x_ticks), _tick_labels(x_ticks), strict=True)
    name = f"{chart.title} ({chart.unit}) over training steps" if chart.unit else chart.title
    flags, flag_labels = _marks(x, marks)
    return (
        f'<div class="plot{" log" if x.log else ""}" data-chart="{_hover_data(chart, x, y)}">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(name)}"><path class="grid" d="{grid}"/>{flags}{curves}</svg>'
        f'<div class="y">{_labels("top", y_labels)}</div>'
        f'<div class="x"><i>step</i>{_labels("left", x_labels)}</div>{flag_labels}</div>'
    )


def _labels(side: str, labels: Iterable[tuple[float, str]]) -> str:
    return "".join(f'<span style="{side}:{at:.2%}">{escape(text)}</span>' for at, text in labels)


def _marks(x: Axis, marks: Sequence[tuple[float, str, str]]) -> tuple[str, str]:
    """Vertical lines for the SVG, and beside it the labels that have room."""
    inside = [mark for mark in marks if x.low <= mark[0] <= x.high]
    lines = "".join(
        f'<path class="mark" d="M{x.fraction(step) * _SIZE:.1f} 0V{_SIZE}">'
        f"<title>{escape(text)}</title></path>"
        for step, _, text in inside
    )
    labels = []
    for (step, label, _), after in itertools.zip_longest(inside, inside[1:]):
        at = x.fraction(step)
        if after is None or x.fraction(after[0]) - at > _MARK_LABEL_ROOM:
            flip = ' class="flip"' if at > 1 - _MARK_LABEL_ROOM else ""
            labels.append(f'<span{flip} style="left:{at:.2%}">{escape(label)}</span>')
    return lines, f'<div class="marks">{"".join(labels)}</div>'


def _legend(chart: Chart) -> str:
    if len(chart.series) < 2:
        value = chart.series[0].points[-1][1]
        return f'<span class="now">{format_value(value)}</span>'
    entries = "".join(
        f'<span class="key c{series.color}">{escape(series.name)}'
        f"<b>{format_value(series.points[-1][1])}</b></span>"
        for series in chart.series
    )
    return f'<span class="legend">{entries}</span>'


def chart_html(
    chart: Chart,
    *,
    last_step: float,
    marks: Sequence[tuple[float, str, str]] = (),
    choose_log_x: bool = False,
) -> str:
    """A <figure> with the chart, or "" where no series has a point.

    `marks` are (step, label, text) drawn as vertical lines. With `choose_log_x` both a linear and
    a logarithmic step axis are drawn and the reader switches between them.
    """
    series = [one for one in chart.series if one.points]
    if not series:
        return ""
    chart = replace(chart, series=series)
    unit = f"<small>{escape(chart.unit)}</small>" if chart.unit else ""
    body = _plot(chart, _x_axis(last_step, log=False), marks=marks)
    switch = ""
    if choose_log_x:
        body += _plot(chart, _x_axis(last_step, log=True), marks=marks)
        switch = '<label class="switch"><input type="checkbox">log steps</label>'
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}{unit}</h3>"
        f"{_legend(chart)}{switch}</figcaption>{body}{note}</figure>"
    )
