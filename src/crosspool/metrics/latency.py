"""Latencies as the client sees them, in histograms with vLLM's names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

FIRST_TOKEN_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
TOKEN_BUCKETS = (
    *(0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 3840.0, 7680.0),
)
LABELS = ("model_name",)


class LatencyHistograms:
    """Time to first token, time between tokens and time of whole requests, by model. Seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABELS, registry=registry, buckets=buckets)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds", "Between deliveries of tokens of a request.", TOKEN_BUCKETS
        )
        self.per_output_token = histogram(
            "vllm:time_per_output_token_seconds",
            "The same as vllm:inter_token_latency_seconds, under the name that older dashboards use.",
            TOKEN_BUCKETS,
        )
        self.whole_request = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_BUCKETS
        )


class SequenceTimer:
    """Times one sequence from its arrival. Times are seconds of one monotonic clock."""

    def __init__(self, histograms: LatencyHistograms, model: str, arrival: float) -> None:
        self._histograms = histograms
        self._model = model
        self._arrival = arrival
        self._last_delivery: float | None = None
        self._gaps: tuple[Histogram, ...] = ()

    def delivered(self, now: float) -> None:
        """One or more new tokens were delivered together."""
        if self._last_delivery is None:
            self._histograms.first_token.labels(self._model).observe(now - self._arrival)
        else:
            if not self._gaps:
                histograms = (self._histograms.inter_token, self._histograms.per_output_token)
                self._gaps = tuple(histogram.labels(self._model) for histogram in histograms)
            for histogram in self._gaps:
                histogram.observe(now - self._last_delivery)
        self._last_delivery = now

    def ended(self, now: float) -> None:
        """The sequence ended with all its tokens delivered."""
        self._histograms.whole_request.labels(self._model).observe(now - self._arrival)
