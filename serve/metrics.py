"""Prometheus metrics under the names that vLLM uses, so that its dashboards and routers fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from secateur.serve.engine import Engine, EngineStats, Event, Generation
from secateur.serve.status import Speed

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABEL = ("model_name",)


# Name, help, and the number; those from an engine without a KV cache are 0.
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "Requests being computed.", lambda stats: stats.running),
    ("num_requests_waiting", "Requests waiting for their turn.", lambda stats: stats.waiting),
    (
        "kv_cache_usage_perc",
        "Share of the KV cache's pages that running requests hold, 0 to 1.",
        lambda stats: stats.pages_used / max(stats.pages, 1),
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda stats: stats.prefix_queries,
    ),
    ("prefix_cache_hits", "Prompt tokens found there.", lambda stats: stats.prefix_hits),
    ("num_preemptions", "Requests sent back to wait.", lambda stats: stats.preemptions),
)


class _EngineCollector(Collector):
    """The numbers that the engine itself keeps, all of one moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats, label = self._engine.stats(), [self._engine.model_name]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, number in table:
                family = kind(f"vllm:{name}", text, labels=_LABEL)
                family.add_metric(label, number(stats))
                yield family


class ServerMetrics:
    """The metrics of one app, in a registry of its own.

    Args:
        engine: asked for its running and waiting requests at each scrape.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.speed = Speed()
        self._model = engine.model_name

        def counter(name: str, text: str) -> Counter:
            metric = Counter(f"vllm:{name}", text, _LABEL, registry=self.registry)
            return metric.labels(self._model)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            metric = Histogram(
                f"vllm:{name}", text, _LABEL, registry=self.registry, buckets=buckets
            )
            return metric.labels(self._model)

        self.registry.register(_EngineCollector(engine))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABEL, "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(self._model, reason)
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token."
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between a token and the one before it."
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1) of a request.",
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its end."
        )
        self.queue = histogram("request_queue_time_seconds", "Waiting before the first turn.")
        self.prefill = histogram(
            "request_prefill_time_seconds", "From the first turn to the first token."
        )
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self.output_length = histogram("request_generation_tokens", "Generated tokens.", _TOKENS)

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def follow(self, generation: Generation) -> RequestClock:
        """Count one request; see `RequestClock`."""
        return RequestClock(self, generation)

    def ended(self, reason: str) -> None:
        """Count the end of a request."""
        self._success.labels(self._model, reason).inc()


class RequestClock:
    """Times one request from its events."""

    def __init__(self, metrics: ServerMetrics, generation: Generation) -> None:
        self._metrics = metrics
        self._generation = generation
        self._tokens = 0
        self._first = self._last = 0.0
        self._open = True

    def event(self, event: Event) -> None:
        """Note an event."""
        metrics, generation = self._metrics, self._generation
        if not self._last and event.finish_reason != "abort":
            length = len(generation.request.prompt)
            metrics.prompt_tokens.inc(length)
            metrics.prompt_length.observe(length)
        if event.token_id is not None:
            if self._tokens:
                metrics.inter_token.observe(event.time - self._last)
            else:
                self._first = event.time
                metrics.first_token.observe(event.time - generation.submitted)
            self._tokens += 1
            metrics.generation_tokens.inc()
            metrics.speed.count(event.time)
        self._last = event.time
        if event.finish_reason is not None:
            self.end(event.finish_reason)

    def end(self, reason: str) -> None:
        """Note the end, once; later calls do nothing."""
        if not self._open:
            return
        self._open = False
        metrics, generation = self._metrics, self._generation
        metrics.ended(reason)
        metrics.whole.observe((self._last or time.monotonic()) - generation.submitted)
        metrics.output_length.observe(self._tokens)
        if generation.started is not None:
            metrics.queue.observe(generation.started - generation.submitted)
            if self._tokens:
                metrics.prefill.observe(self._first - generation.started)
                metrics.decode.observe(self._last - self._first)
        if self._tokens > 1:
            metrics.per_token.observe((self._last - self._first) / (self._tokens - 1))
