"""What the server tells Prometheus. One `Metrics` a server, with a registry of its own.

A request here is one HTTP request that asks for tokens; a sample is one text that is made for it,
which is what the engine counts. Intervals are measured on one process's `time.monotonic()`.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from meshlm.serving.stats import Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Labels that the server writes; anything else is counted as "other", so that they stay few.
FINISHED = ("stop", "length", "cancelled", "deadline", "draining", "engine")
REJECTED = (
    "invalid",
    "not_found",
    "unauthorized",
    "forbidden_host",
    "too_large",
    "bodies",
    "slow",
    "connections",
    "queue_full",
    "loading",
    "draining",
    "failed",
)
_COMPLETE = ("stop", "length")

_WAITS_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2, 5)

_GAUGES = (
    ("samples_running", "Samples that have a slot or are in prefill.", "running"),
    ("samples_waiting", "Samples in the queue.", "waiting"),
    ("slots", "Samples that can be decoded at once.", "slots"),
    ("cache_positions_used", "Positions of the key-value cache in use.", "places_used"),
    ("cache_positions", "Positions of the key-value cache.", "places"),
    ("prefix_cache_bytes", "Keys and values kept of earlier prompts.", "prefix_bytes"),
)
_COUNTERS = (
    ("samples_finished", "Samples that became whole.", "finished"),
    ("samples_cancelled", "Samples whose client went away.", "cancelled"),
    ("samples_failed", "Samples that failed.", "failed"),
    ("decode_steps", "Decoding steps, each over all slots.", "decode_steps"),
    ("prompt_tokens", "Tokens of prompts, the reused ones included.", "prompt_tokens"),
    ("cached_tokens", "Tokens of prompts that were computed before.", "cached_tokens"),
    ("generated_tokens", "Tokens generated.", "generated_tokens"),
    ("compilations", "Functions compiled since the start.", "compilations"),
)


class Metrics:
    """The numbers of one server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes them all zero; `clock` gives seconds."""
        self.clock = clock
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "meshlm_requests", "Requests that were taken up.", registry=registry
        )
        self._finished = Counter(
            "meshlm_requests_finished",
            "Requests that ended, by how: stop and length are whole ones.",
            ["reason"],
            registry=registry,
        )
        self._rejected = Counter(
            "meshlm_requests_rejected",
            "Requests that were not taken up, by why.",
            ["reason"],
            registry=registry,
        )
        self._responses = Counter(
            "meshlm_http_responses", "Responses, by status.", ["status"], registry=registry
        )
        self._queue = self._seconds("queue_seconds", "Time that a sample waited for a slot.")
        self._first = self._seconds(
            "time_to_first_token_seconds", "Time from a request's arrival to its first token."
        )
        self._between = self._seconds(
            "inter_token_seconds", "Time between two tokens of a sample.", _TOKENS_S
        )
        self._whole = self._seconds(
            "request_seconds", "Time from a request's arrival to its end, whole ones only."
        )
        # A label that never occurred shows as 0: a rate over it has a beginning.
        for reason in FINISHED:
            self._finished.labels(reason)
        for reason in REJECTED:
            self._rejected.labels(reason)
        self._now = _Now()
        registry.register(self._now)
        ProcessCollector(registry=registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...] = _WAITS_S) -> Histogram:
        return Histogram(f"meshlm_{name}", text, buckets=buckets, registry=self.registry)

    def watch_engine(self, stats: Callable[[], Stats]) -> None:
        """Has the engine's counts read by `stats()` whenever somebody asks for the metrics."""
        self._now.stats = stats

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Has the open connections counted by `count()` whenever somebody asks for the metrics."""
        self._now.connections = count

    def request_started(self) -> "RequestTimer":
        """Counts a request that was taken up, and returns what times it. Tell its end, always."""
        self._requests.inc()
        return RequestTimer(self)

    def rejected(self, reason: str) -> None:
        """Counts a request that was not taken up; `reason` is one of `REJECTED`."""
        self._rejected.labels(reason if reason in REJECTED else "other").inc()

    def responded(self, status: int) -> None:
        """Counts a response of any route."""
        self._responses.labels(str(status)).inc()

    def render(self) -> bytes:
        """Returns all of it in Prometheus' text format, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


class RequestTimer:
    """Times one request, from the moment that it was taken up."""

    def __init__(self, metrics: Metrics) -> None:
        """Starts the time; `Metrics.request_started` makes it."""
        self._metrics = metrics
        self._started_s = metrics.clock()
        self._last_s: dict[int, float] = {}
        self._ended = False

    def queued(self, seconds: float) -> None:
        """Notes how long one of its samples waited for a slot."""
        self._metrics._queue.observe(seconds)

    def first_token(self) -> None:
        """Notes the first token of the request; `tokens` does it too. Later calls do nothing."""
        if not self._last_s:
            now_s = self._metrics.clock()
            self._metrics._first.observe(now_s - self._started_s)
            self._last_s[-1] = now_s

    def tokens(self, count: int = 1, sample: int = 0) -> None:
        """Notes that `count` tokens of a sample came now, together."""
        if count < 1:
            return
        now_s = self._metrics.clock()
        self.first_token()
        last_s = self._last_s.get(sample)
        self._last_s[sample] = now_s
        if last_s is not None:
            for _ in range(count):
                self._metrics._between.observe((now_s - last_s) / count)

    def finished(self, reason: str) -> None:
        """Notes the end: one of `FINISHED`. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics._finished.labels(reason if reason in FINISHED else "other").inc()
        if reason in _COMPLETE:
            self._metrics._whole.observe(self._metrics.clock() - self._started_s)


class _Now(Collector):
    """What is read when somebody asks."""

    def __init__(self) -> None:
        self.stats: Callable[[], Stats] | None = None
        self.connections: Callable[[], int] | None = None

    def collect(self) -> Iterator[Metric]:
        stats = Stats() if self.stats is None else self.stats()
        for name, text, field in _GAUGES:
            yield GaugeMetricFamily(f"meshlm_{name}", text, getattr(stats, field))
        for name, text, field in _COUNTERS:
            yield CounterMetricFamily(f"meshlm_{name}", text, getattr(stats, field))
        open_now = 0 if self.connections is None else self.connections()
        yield GaugeMetricFamily("meshlm_connections", "Connections that are open.", open_now)
