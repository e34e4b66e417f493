"""What /metrics says: one registry of our own, filled from a snapshot of the engine at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from crosspool.core.info import EngineStats, ModelStats
from crosspool.metrics.latency import LatencyHistograms

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """All metrics of one server. ``render`` takes the engine's figures, None while there is no engine."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._engine = _EngineCollector()
        self._registry.register(self._engine)
        self.latencies = LatencyHistograms(self._registry)
        self.engine_starts = Counter(
            "crosspool_engine_starts", "Engine processes that became ready.", registry=self._registry
        )
        self.error_responses = Counter(
            "crosspool_error_responses",
            "Requests answered with an error, by HTTP status.",
            ("status",),
            registry=self._registry,
        )

    def render(self, stats: EngineStats | None) -> bytes:
        """Prometheus text, version 0.0.4."""
        self._engine.stats = stats
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self) -> None:
        self.stats: EngineStats | None = None

    def collect(self) -> Iterable[Metric]:
        if self.stats is not None:
            yield from _model_metrics(self.stats)
            yield from _finished(self.stats)
            yield from _pool_metrics(self.stats)


def _model_metrics(stats: EngineStats) -> Iterable[Metric]:
    pages = max(stats.kv_pages_total, 1)
    gauges: list[tuple[str, str, Callable[[ModelStats], float]]] = [
        ("vllm:num_requests_running", "Sequences being computed.", lambda model: model.running),
        ("vllm:num_requests_waiting", "Sequences waiting to be computed.", lambda model: model.waiting),
        (
            "vllm:kv_cache_usage_perc",
            "Share of the KV pool that the model's sequences hold (1 is all of it).",
            lambda model: model.kv_pages_held / pages,
        ),
        (
            "crosspool_kv_pool_bytes",
            "Bytes of the KV pool that the model's sequences hold.",
            lambda model: model.kv_pages_held * stats.page_bytes,
        ),
    ]
    counters: list[tuple[str, str, Callable[[ModelStats], float]]] = [
        ("vllm:num_preemptions", "Sequences preempted.", lambda model: model.preemptions),
        (
            "vllm:prefix_cache_queries",
            "Prompt tokens that were looked for in the prefix cache.",
            lambda model: model.prompt_tokens if model.prefix_cache else 0,
        ),
        (
            "vllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            lambda model: model.cached_tokens,
        ),
        (
            "crosspool_prefix_cache_evicted_pages",
            "Cached pages given up because a page was needed.",
            lambda model: model.cached_pages_evicted,
        ),
        (
            "crosspool_spilled_sequences",
            "Preempted sequences that were copied to host memory.",
            lambda model: model.spilled_sequences,
        ),
        ("crosspool_spilled_bytes", "Bytes copied to host memory.", lambda model: model.spilled_bytes),
        (
            "crosspool_returned_sequences",
            "Sequences that were copied back from host memory.",
            lambda model: model.returned_sequences,
        ),
        ("crosspool_returned_bytes", "Bytes copied back.", lambda model: model.returned_bytes),
        ("vllm:prompt_tokens", "Prompt tokens processed.", lambda model: model.prompt_tokens),
        ("vllm:generation_tokens", "Tokens generated.", lambda model: model.generation_tokens),
    ]
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        for model in stats.models:
            gauge.add_metric([model.name], value(model))
        yield gauge
    for name, text, value in counters:
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        for model in stats.models:
            counter.add_metric([model.name], value(model))
        yield counter


def _finished(stats: EngineStats) -> Iterable[Metric]:
    counter = CounterMetricFamily(
        "vllm:request_success", "Sequences ended, by reason.", labels=["model_name", "finished_reason"]
    )
    for model in stats.models:
        for reason, count in sorted((model.finished or {}).items()):
            counter.add_metric([model.name, reason], count)
    yield counter


def _pool_metrics(stats: EngineStats) -> Iterable[Metric]:
    yield GaugeMetricFamily("crosspool_kv_pages_total", "Pages of the KV pool.", stats.kv_pages_total)
    yield GaugeMetricFamily(
        "crosspool_kv_pages_free", "Pages of the KV pool that hold nothing.", stats.kv_pages_free
    )
    yield GaugeMetricFamily(
        "crosspool_kv_pages_cached",
        "Pages that nobody holds, kept by the prefix cache until they are needed.",
        stats.kv_pages_cached,
    )
    yield GaugeMetricFamily("crosspool_kv_page_bytes", "Bytes of one page of the KV pool.", stats.page_bytes)
    yield GaugeMetricFamily(
        "crosspool_weights_pool_bytes", "Bytes of the weights pool.", stats.weights_pool_bytes
    )
    yield GaugeMetricFamily(
        "crosspool_weights_used_bytes", "Bytes of the weights pool in use.", stats.weights_used_bytes
    )
    yield GaugeMetricFamily(
        "crosspool_spill_store_bytes", "Bytes of host memory for spilled pages.", stats.spill_store_bytes
    )
    yield GaugeMetricFamily(
        "crosspool_spill_used_bytes", "Bytes of the spill store in use.", stats.spill_used_bytes
    )
