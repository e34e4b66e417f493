from __future__ import annotations

import pytest

from crosspool.bench.client import Failure, Record
from crosspool.bench.statistics import figures, summarise

pytestmark = pytest.mark.unit


def record(due: float, *events: float, ended: float | None = None, **fields: object) -> Record:
    return Record("a", 4, due, due + 0.5, list(events), ended, **fields)  # type: ignore[arg-type]


def test_a_summary() -> None:
    summary = summarise([float(value) for value in range(101)])
    assert summary is not None
    assert (summary.count, summary.mean, summary.p50, summary.p90, summary.p99, summary.max) == (
        *(101, 50, 50, 90, 99),
        100,
    )
    assert summarise([]) is None


def test_figures_of_what_finished_failed_and_was_cut_off() -> None:
    records = [
        record(10.0, 11.0, 11.1, 11.2, ended=11.3, prompt_tokens=7, output_tokens=4),
        record(10.0, 12.0, 12.5, ended=13.0, failure=Failure("cut off", "first")),
        record(11.0, ended=11.1, failure=Failure("cut off", "second")),
        record(12.0, 13.0),
        record(12.0, 12.7, ended=14.0),
    ]
    found = figures(records, 4.0)
    assert (found.requests, found.finished, found.failed, found.unfinished) == (5, 2, 2, 1)
    assert (found.prompt_tokens, found.output_tokens, found.events) == (7, 8, 7)
    assert (found.finished_tokens, found.wanted_tokens, found.without_usage) == (5, 8, 1)
    assert (found.errors["cut off"].count, found.errors["cut off"].example) == (2, "first")
    assert found.tokens_per_event == pytest.approx(8 / 7)
    assert found.ttft_ms is not None and found.tbt_ms is not None and found.e2e_ms is not None
    assert (found.ttft_ms.count, found.ttft_ms.max) == (4, 2000)
    assert found.tbt_ms.count == 3
    assert found.largest_gap_over_median == pytest.approx(5)
    assert found.e2e_ms.mean == pytest.approx((1300 + 2000) / 2)
    assert found.late_ms is not None and found.late_ms.p50 == 500
    assert (found.output_tokens_per_second, found.requests_per_second) == (2.0, 0.5)


def test_figures_of_nothing() -> None:
    found = figures([], 0.0)
    assert (found.requests, found.failed_share, found.ttft_ms, found.tokens_per_event) == (0, 0, None, None)
