"""What Prometheus is told, read back by its own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from meshlm.serving.metrics import FINISHED, REJECTED, Metrics
from meshlm.serving.stats import Stats


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def samples(metrics: Metrics) -> dict[str, float]:
    """{name{label=value}: number}"""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_times_of_a_request():
    clock = Clock()
    metrics = Metrics(clock)
    timer = metrics.request_started()
    timer.queued(0.4)
    clock.now_s += 1.0
    timer.tokens(1)
    clock.now_s += 0.3
    timer.tokens(3)
    timer.tokens(0)
    clock.now_s += 0.2
    timer.finished("stop")
    timer.finished("engine")
    found = samples(metrics)
    assert found["meshlm_requests_total"] == 1
    assert found["meshlm_requests_finished_total{reason=stop}"] == 1
    assert found["meshlm_requests_finished_total{reason=engine}"] == 0
    assert found["meshlm_queue_seconds_sum"] == 0.4
    assert found["meshlm_time_to_first_token_seconds_sum"] == 1.0
    assert found["meshlm_inter_token_seconds_count"] == 3
    assert found["meshlm_inter_token_seconds_sum"] == pytest.approx(0.3)
    assert found["meshlm_inter_token_seconds_bucket{le=0.1}"] == 3
    assert found["meshlm_request_seconds_sum"] == pytest.approx(1.5)


def test_samples_of_a_request_are_timed_apart():
    clock = Clock()
    metrics = Metrics(clock)
    timer = metrics.request_started()
    for _ in range(3):
        for sample in (0, 1):
            timer.tokens(1, sample)
        clock.now_s += 1.0
    found = samples(metrics)
    assert found["meshlm_time_to_first_token_seconds_count"] == 1
    assert found["meshlm_inter_token_seconds_count"] == 4
    assert found["meshlm_inter_token_seconds_sum"] == pytest.approx(4.0)


def test_only_whole_requests_have_a_time():
    metrics = Metrics()
    for reason in FINISHED:
        metrics.request_started().finished(reason)
    found = samples(metrics)
    assert found["meshlm_request_seconds_count"] == 2
    assert found["meshlm_time_to_first_token_seconds_count"] == 0
    ended = [found[f"meshlm_requests_finished_total{{reason={reason}}}"] for reason in FINISHED]
    assert sum(ended) == found["meshlm_requests_total"] == len(FINISHED)


def test_reasons_are_few():
    metrics = Metrics()
    for reason in (*REJECTED, "x" * 50, "\n", "queue_full"):
        metrics.rejected(reason)
    metrics.request_started().finished("whatever")
    found = samples(metrics)
    rejected = {k: v for k, v in found.items() if k.startswith("meshlm_requests_rejected_total")}
    assert len(rejected) == len(REJECTED) + 1
    assert rejected["meshlm_requests_rejected_total{reason=other}"] == 2
    assert rejected["meshlm_requests_rejected_total{reason=queue_full}"] == 2
    assert found["meshlm_requests_finished_total{reason=other}"] == 1


def test_the_engine_is_read_when_asked():
    metrics = Metrics()
    assert samples(metrics)["meshlm_samples_running"] == 0
    now = Stats(running=3, waiting=5, generated_tokens=70, slots=8, places_used=9, places=80)
    metrics.watch_engine(lambda: now)
    metrics.watch_connections(lambda: 4)
    found = samples(metrics)
    assert found["meshlm_samples_running"] == 3
    assert found["meshlm_samples_waiting"] == 5
    assert found["meshlm_generated_tokens_total"] == 70
    assert (found["meshlm_cache_positions_used"], found["meshlm_cache_positions"]) == (9, 80)
    assert found["meshlm_connections"] == 4
    assert found["process_resident_memory_bytes"] > 1e6


def test_servers_count_apart():
    one, other = Metrics(), Metrics()
    one.rejected("invalid")
    assert samples(other)["meshlm_requests_rejected_total{reason=invalid}"] == 0
