"""What a reader saw in a stretch of time."""

from __future__ import annotations

import pytest
from peers.company import Reader, over_alone
from peers.load import Endpoint

pytestmark = pytest.mark.backend


def reader_of(*requests: list[float]) -> Reader:
    """Its requests were sent at 0, 10, 20 ... seconds."""
    sent = [10.0 * number for number in range(len(requests))]
    return Reader(Endpoint("http://nowhere", "model"), 1, 1, 0, list(requests), sent)


def test_gaps_that_lie_in_part_in_the_time_count_in_full() -> None:
    reader = reader_of([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    assert reader.gaps(2.0, 7.0) == [2000, 3000, 4000]


def test_there_is_no_gap_between_requests() -> None:
    assert reader_of([0.0, 1.0], [5.0, 7.0]).gaps(0.0, 7.0) == [1000, 2000]


def test_a_stream_that_stands_still_is_seen() -> None:
    assert reader_of([0.0, 1.0]).gaps(2.0, 60.0) == [59_000]


def test_waiting_for_a_first_token_is_no_gap() -> None:
    assert reader_of([0.0, 1.0], []).gaps(0.0, 60.0) == [1000]


def test_waits_are_those_of_requests_sent_in_the_time() -> None:
    reader = reader_of([1.0, 2.0], [13.0, 14.0], [45.0], [])
    assert reader.waits(5.0, 40.0) == [3, 20, 10]
    assert reader.waits(5.0, 15.0) == [3]


def test_over_alone() -> None:
    assert over_alone([2.0, 4.0, 12.0], [1.0, 2.0, 3.0]) == {
        "tbt_p50_over_alone": 2,
        "tbt_p99_over_alone": pytest.approx((4 + 0.98 * 8) / (2 + 0.98)),
        "tbt_max_over_alone": 4,
    }
