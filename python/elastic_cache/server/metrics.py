"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elastic_cache.events import Timing
from elastic_cache.service import Stats

_PREFIX = "elastic_cache_"
# Seconds. A step takes 1 ms to 1 s on all machines so far, an answer up to minutes.
_STEP_BUCKETS = (0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_WAIT_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counts and times; thread-safe.

    Args:
        stats: what the service knows of itself, asked when the metrics are read.
    """

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(stats))
        self._requests = Counter(
            _PREFIX + "requests",
            "Requests that ended, by path and outcome.",
            ["endpoint", "outcome"],
            registry=self._registry,
        )
        self._queue = self._histogram("queue", "From submission to the batch.", _WAIT_BUCKETS)
        self._first_token = self._histogram(
            "first_token", "From submission to the first committed token.", _WAIT_BUCKETS
        )
        self._total = self._histogram("request", "From submission to the end.", _WAIT_BUCKETS)
        self._step = self._histogram("step", "A request's denoising steps.", _STEP_BUCKETS)

    def count(self, endpoint: str, outcome: str) -> None:
        """A request ended."""
        self._requests.labels(endpoint, outcome).inc()

    def add_step(self, seconds: float) -> None:
        """A request went on by one step."""
        self._step.observe(seconds)

    def add_answer(self, timing: Timing) -> None:
        """A request was answered, completely or not."""
        self._queue.observe(timing.queue)
        self._total.observe(timing.total)
        if timing.first_token is not None:
            self._first_token.observe(timing.first_token)

    def write(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}{name}_seconds", text, buckets=buckets, registry=self._registry)


class _ServiceCollector(Collector):
    """The service's own counts, as they are when someone asks."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge(_PREFIX + "queue_depth", "Requests waiting.", now.num_queued)
        yield gauge(_PREFIX + "running", "Requests in the batch.", now.num_running)
        yield counter(_PREFIX + "tokens", "Tokens of finished answers.", now.num_tokens)
        yield counter(_PREFIX + "steps", "Steps of the batch.", now.num_steps)
        yield counter(_PREFIX + "busy_seconds", "Seconds in those steps.", now.busy_seconds)
