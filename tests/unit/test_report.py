import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.training.metrics import MetricsLog
from meshlm.training.report import write_report
from meshlm.training.report.chart import (
    Axis,
    Chart,
    Series,
    chart_html,
    downsample,
    format_value,
    running_average,
)
from meshlm.training.report.record import read_record

VOID = {"meta", "br", "input"}
HOSTILE = '</pre></script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\'"'


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def charts(self):
        return [json.loads(a["data-chart"]) for _, a in self.elements if "data-chart" in a]

    @property
    def titles(self):
        return [a["aria-label"] for a in self.all("svg")]


def report(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def run(tmp_path):
    """A run with 200 steps of 300 behind it, one of them skipped, resumed once."""
    folder = tmp_path / "my-run"
    with MetricsLog(folder, resume_step=None) as log:
        for step in range(1, 201):
            values = {
                "loss": math.nan if step == 77 else 2 + 6 / step,
                "learning_rate": 1e-4,
                "grad_norm": 1.0,
                "tokens": step * 4096,
                "tokens_per_s": 8192.0,
                "step_s": 0.5,
                "data_wait_s": 0.001,
                "mfu": None,
                "skipped": int(step == 77),
            }
            if step % 50 == 0:
                values |= {"val_loss": 2.5, "val_perplexity": 12.18, "val_bits_per_byte": 1.25}
            log.write(step, **values)
    environment = {"jax": "0.12.0.1"}
    write_json(folder / "config.json", {"train": {"steps": 300}, "environment": environment})
    incident = {"step": 100, "kind": "resumed", "message": "from step_100"}
    (folder / "incidents.jsonl").write_text(json.dumps(incident) + '\n{"step": 1')
    for step in (50, 100, 150, 200, 250, 300):
        sample = {"prompt": "Once", "text": f" upon {step}"}
        write_json(folder / f"samples/step_{step}.json", {"step": step, "samples": [sample]})
    return folder


class TestPage:
    def test_what_it_shows(self, run):
        page = report(run)
        text = " ".join(page.text)
        assert "my-run" in page.text
        assert "step 200 of 300" in text
        for shown in ("2.030", "2.500", "1.250", "819,200", "8,192", "100.0"):
            assert shown in page.text
        assert "step 77" in text
        assert "the update was skipped" in text
        assert "from step_100" in text
        assert "0.12.0.1" in page.text
        # First, last and two between, then all of them.
        assert [t for t in page.text if t.startswith(" upon ")] == [
            f" upon {step}" for step in (50, 100, 200, 300, 50, 100, 150, 200, 250, 300)
        ]

    def test_curves_hold_the_values_of_the_file(self, run):
        page = report(run)
        hero = page.charts[0]
        assert [series["name"] for series in hero["series"]] == ["training", "validation"]
        training = dict(map(tuple, hero["series"][0]["points"]))
        assert training[1] == 8
        assert training[60] == 2.1
        assert 77 not in training  # null in the file
        assert hero["series"][1]["points"] == [[step, 2.5] for step in (50, 100, 150, 200)]
        assert [title.split(" over")[0] for title in page.titles] == [
            "Loss (nats a token)",  # twice: linear steps, logarithmic steps
            "Loss (nats a token)",
            "Validation bits per byte (bits)",
            "Validation perplexity",
            "Learning rate",
            "Gradient norm (before clipping)",
            "Throughput (tokens/s)",
            "Step time (ms)",
        ]  # MFU is null everywhere: no chart

    def test_nothing_comes_from_elsewhere(self, run):
        page = report(run)
        for tag, attrs in page.elements:
            assert tag not in ("link", "img", "iframe", "object", "base", "form")
            assert not {"src", "href", "srcset"} & attrs.keys()
        html = (run / "report.html").read_text()
        assert not re.search(r"@import|url\(|fetch\(|https?://", html)
        assert "default-src 'none'" in page.all("meta")[1]["content"]

    def test_hostile_texts_stay_texts(self, run):
        sample = {"prompt": HOSTILE, "text": HOSTILE + "\0\ud800"}
        write_json(run / "samples/step_9.json", {"step": 9, "samples": [sample]})
        incident = {"step": 3, "kind": HOSTILE, "message": HOSTILE}
        (run / "incidents.jsonl").write_text(json.dumps(incident))
        config = {HOSTILE: HOSTILE, "group": {HOSTILE: [HOSTILE]}, "environment": {"x": HOSTILE}}
        write_json(run / "config.json", config)
        page = report(run)
        assert len(page.all("script")) == 1
        assert page.all("img") == []
        assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
        # Sample 2, incident 2, its lines in the two plots 2 x 2, settings 4, environment 1.
        assert sum(HOSTILE in text for text in page.text) == 13

    def test_hostile_folder_name(self, tmp_path):
        folder = tmp_path / "<script>alert(1)<"
        folder.mkdir()
        assert folder.name in report(folder).text

    def test_replaced_whole(self, run):
        first = write_report(run)
        assert first == run / "report.html"
        assert write_report(run) == first
        assert list(run.glob("*.partial")) == []


class TestFewPoints:
    def test_an_empty_folder(self, tmp_path):
        page = report(tmp_path)
        assert "No metrics yet." in page.text
        assert "Not started" in page.text
        assert page.charts == []

    @pytest.mark.parametrize("step", [0, 1, 5])
    def test_one_point(self, tmp_path, step):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(step, loss=2.0, grad_norm=0.0)
        page = report(tmp_path)
        assert page.charts[0]["series"][0]["points"] == [[step, 2]]
        assert all("NaN" not in attrs.get("d", "") for attrs in page.all("path"))

    def test_only_nulls(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(1, loss=math.nan, grad_norm=math.inf)
        assert "No metrics yet." in report(tmp_path).text

    def test_damaged_files(self, run):
        (run / "config.json").write_text('{"torn')
        (run / "samples/step_1.json").write_bytes(b"\xff\xfe")
        write_json(run / "samples/step_2.json", {"step": "two", "samples": [{}]})
        write_json(run / "samples/step_3.json", {"step": 3, "samples": [{"prompt": 1}, None]})
        (run / "incidents.jsonl").write_text("null\n[]\n{}\n")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": null, "loss": 1}\n{"step": 201, "loss": "text"}\n{"ste')
        page = report(run)
        assert "step 201" in " ".join(page.text)
        assert page.charts[0]["series"][0]["points"][-1] == [200, 2.03]


class TestRecord:
    @pytest.mark.parametrize(
        ("planned", "incidents", "status"),
        [
            (200, [], "finished"),
            (300, [], "training"),
            (None, [], "training"),
            (300, [(200, "stopped")], "stopped"),
            (300, [(200, "failed")], "failed"),
            (300, [(150, "stopped"), (150, "resumed")], "training"),
            (300, [(200, "stopped"), (200, "resumed")], "training"),
        ],
    )
    def test_status(self, run, planned, incidents, status):
        write_json(run / "config.json", {"steps": planned})
        lines = (json.dumps({"step": s, "kind": k, "message": ""}) for s, k in incidents)
        (run / "incidents.jsonl").write_text("\n".join(lines))
        assert read_record(run).status == status

    def test_training_time_counts_steps_between_lines(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            for step in (10, 20, 30):
                log.write(step, step_s=0.5)
        assert read_record(tmp_path).training_s == 15.0

    def test_a_later_line_of_a_step_counts(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(2, loss=3.0)
            log.write(1, loss=5.0)
            log.write(2, loss=4.0, val_loss=1.0)
        record = read_record(tmp_path)
        assert record.points("loss") == [(1, 5), (2, 4)]
        assert record.points("val_loss") == [(2, 1)]


finite = st.floats(-1e6, 1e6)


class TestChart:
    @given(values=st.lists(finite, min_size=1, max_size=400), buckets=st.integers(1, 50))
    def test_downsampling_keeps_extremes_and_ends(self, values, buckets):
        points = list(enumerate(values))
        kept = downsample(points, buckets)
        assert len(kept) <= 2 * buckets + 2
        assert kept == sorted(set(kept))
        assert set(kept) <= set(points)
        assert {kept[0], kept[-1]} == {points[0], points[-1]}
        assert min(y for _, y in kept) == min(values)
        assert max(y for _, y in kept) == max(values)

    def test_running_average(self):
        flat = running_average([(x, 3.0) for x in range(500)])
        assert [y for _, y in flat] == pytest.approx([3.0] * 500)
        # A straight line stays where it is but for the very end: no lag.
        line = running_average([(x, float(x)) for x in range(500)])
        assert [y for _, y in line[:490]] == pytest.approx(range(490))

    @given(low=finite, span=st.floats(1e-3, 1e6), log=st.booleans())
    def test_ticks_are_few_and_inside(self, low, span, log):
        axis = Axis(low=abs(low) + 1e-3, high=abs(low) + span + 1e-3, log=log)
        ticks = axis.ticks()
        room = 1e-2 * span
        assert 1 <= len(ticks) <= 12
        assert all(axis.low - room <= tick <= axis.high + room for tick in ticks)
        fractions = [axis.fraction(tick) for tick in ticks]
        assert fractions == sorted(fractions)

    def test_ticks_by_hand(self):
        assert Axis(low=0, high=1000).ticks() == [0, 200, 400, 600, 800, 1000]
        assert Axis(low=1.4, high=2.1).ticks() == [1.4, 1.6, 1.8, 2.0]
        assert Axis(low=1, high=1000, log=True).ticks() == [1, 3, 10, 30, 100, 300, 1000]
        assert Axis(low=1, high=1e4, log=True).fraction(100) == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0, "0"),
            (6e-4, "6e-4"),
            (1.25e-5, "1.25e-5"),
            (0.0123, "0.0123"),
            (3.14159, "3.142"),
            (-2.5, "-2.5"),
            (12345.6, "12,346"),
            (8_192_000, "8.192 M"),
            (4.02e11, "402 B"),
        ],
    )
    def test_values(self, value, text):
        assert format_value(value) == text

    @given(
        st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1),
        st.booleans(),
        st.booleans(),
    )
    def test_any_finite_values_draw(self, values, from_zero, log_y):
        series = Series(name="a", points=list(enumerate(values)), smooth=True, dots=True)
        chart = Chart(title="t", unit="u", series=[series], from_zero=from_zero, log_y=log_y)
        html = chart_html(chart, last_step=len(values), choose_log_x=True)
        assert Page(html).charts[0]["series"][0]["points"]
        coordinates = re.findall(r'd="([^"]*)"', html)
        assert not re.search(r"nan|inf", " ".join(coordinates))

    def test_marks_without_room_have_no_label(self):
        chart = Chart(title="t", unit="", series=[Series(name="a", points=[(0, 1), (100, 2)])])
        marks = [(10.0, "first", "1"), (12.0, "second", "2"), (99.0, "third", "3")]
        html = chart_html(chart, last_step=100, marks=marks)
        assert len(re.findall('class="mark"', html)) == 3
        assert re.findall(">(first|second|third)<", html) == ["second", "third"]
        assert '<span class="flip" style="left:99.00%">third' in html
