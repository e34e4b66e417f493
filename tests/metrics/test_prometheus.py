from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from crosspool.core.info import EngineStats, ModelStats
from crosspool.metrics.latency import SequenceTimer
from crosspool.metrics.prometheus import Exposition

pytestmark = pytest.mark.unit

STATS = EngineStats(
    models=(
        ModelStats(
            "a",
            running=2,
            waiting=3,
            preemptions=4,
            prompt_tokens=500,
            cached_tokens=300,
            generation_tokens=60,
            kv_pages_held=25,
            prefix_cache=True,
            cached_pages_evicted=9,
            finished={"stop": 7, "length": 1},
            spilled_sequences=5,
            spilled_bytes=40_000,
            returned_sequences=3,
            returned_bytes=20_000,
        ),
        ModelStats('odd "name"\\', kv_pages_held=15),
    ),
    kv_pages_total=100,
    kv_pages_free=50,
    kv_pages_cached=10,
    page_bytes=4096,
    weights_pool_bytes=1_000_000,
    weights_used_bytes=700_000,
    spill_store_bytes=90_000,
    spill_used_bytes=20_000,
)


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels, as Prometheus would read them."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_engines_figures_have_vllms_names_and_the_models_label() -> None:
    read = samples(Exposition().render(STATS))
    a = (("model_name", "a"),)
    assert read["vllm:num_requests_running", a] == 2
    assert read["vllm:num_requests_waiting", a] == 3
    assert read["vllm:num_preemptions_total", a] == 4
    assert read["vllm:prompt_tokens_total", a] == 500
    assert read["vllm:generation_tokens_total", a] == 60
    assert read["vllm:prefix_cache_queries_total", a] == 500
    assert read["vllm:prefix_cache_hits_total", a] == 300
    assert read["crosspool_prefix_cache_evicted_pages_total", a] == 9
    assert read["vllm:kv_cache_usage_perc", a] == 0.25
    assert read["vllm:request_success_total", (("finished_reason", "stop"), *a)] == 7
    assert read["vllm:request_success_total", (("finished_reason", "length"), *a)] == 1
    assert read["crosspool_kv_pool_bytes", a] == 25 * 4096


def test_the_pools_are_told_and_their_pages_sum_up() -> None:
    read = samples(Exposition().render(STATS))
    assert read["crosspool_kv_pages_total", ()] == 100
    assert read["crosspool_kv_pages_free", ()] == 50
    assert read["crosspool_kv_pages_cached", ()] == 10
    assert read["crosspool_kv_page_bytes", ()] == 4096
    assert read["crosspool_weights_pool_bytes", ()] == 1_000_000
    assert read["crosspool_weights_used_bytes", ()] == 700_000
    held = sum(value for (name, _), value in read.items() if name == "crosspool_kv_pool_bytes")
    assert held + 60 * 4096 == 100 * 4096


def test_what_was_copied_to_host_memory_and_back_is_told() -> None:
    read = samples(Exposition().render(STATS))
    a = (("model_name", "a"),)
    assert read["crosspool_spilled_sequences_total", a] == 5
    assert read["crosspool_spilled_bytes_total", a] == 40_000
    assert read["crosspool_returned_sequences_total", a] == 3
    assert read["crosspool_returned_bytes_total", a] == 20_000
    assert read["crosspool_spill_store_bytes", ()] == 90_000
    assert read["crosspool_spill_used_bytes", ()] == 20_000


def test_names_with_quotes_and_backslashes_survive() -> None:
    read = samples(Exposition().render(STATS))
    assert read["crosspool_kv_pool_bytes", (("model_name", 'odd "name"\\'),)] == 15 * 4096


def test_an_empty_pool_is_no_division_by_zero() -> None:
    nothing = EngineStats((ModelStats("a"),), 0, 0, 0, 4096, 0, 0)
    assert samples(Exposition().render(nothing))["vllm:kv_cache_usage_perc", (("model_name", "a"),)] == 0


def test_without_an_engine_the_fronts_own_figures_remain() -> None:
    exposition = Exposition()
    exposition.engine_starts.inc()
    exposition.error_responses.labels("503").inc(3)
    read = samples(exposition.render(None))
    assert read["crosspool_engine_starts_total", ()] == 1
    assert read["crosspool_error_responses_total", (("status", "503"),)] == 3
    assert not any(name.startswith("crosspool_kv") for name, _ in read)


def test_latencies_are_counted_where_they_fall() -> None:
    exposition = Exposition()
    timer = SequenceTimer(exposition.latencies, "a", arrival=100.0)
    for now in (100.3, 100.32, 100.4):
        timer.delivered(now)
    timer.ended(100.4)
    read = samples(exposition.render(STATS))
    a = (("model_name", "a"),)
    assert read["vllm:time_to_first_token_seconds_count", a] == 1
    assert read["vllm:time_to_first_token_seconds_sum", a] == pytest.approx(0.3)
    assert read["vllm:time_to_first_token_seconds_bucket", (("le", "0.25"), *a)] == 0
    assert read["vllm:time_to_first_token_seconds_bucket", (("le", "0.5"), *a)] == 1
    for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):
        assert read[f"{name}_count", a] == 2
        assert read[f"{name}_sum", a] == pytest.approx(0.1)
        assert read[f"{name}_bucket", (("le", "0.025"), *a)] == 1
    assert read["vllm:e2e_request_latency_seconds_sum", a] == pytest.approx(0.4)


def test_two_servers_in_one_process_share_no_figures() -> None:
    first, second = Exposition(), Exposition()
    first.engine_starts.inc()
    assert samples(second.render(None))["crosspool_engine_starts_total", ()] == 0


def test_metrics_do_not_import_torch() -> None:
    code = "import sys, crosspool.metrics.prometheus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
