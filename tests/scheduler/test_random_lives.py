"""A sample of the random lives; `make fuzz` runs ten thousand."""

from __future__ import annotations

from collections import Counter

import pytest

from crosspool.scheduler.sequence import TRANSITIONS
from helpers_control_plane import Life, live

pytestmark = pytest.mark.unit

SEEDS = 150


@pytest.fixture(scope="module")
def lives() -> list[Life]:
    return [live(seed) for seed in range(SEEDS)]


def test_everybody_finishes_with_the_right_output(lives: list[Life]) -> None:
    assert len(lives) == SEEDS


def test_the_lives_go_everywhere(lives: list[Life]) -> None:
    moves = sum((life.moves for life in lives), Counter())
    assert {move for move in TRANSITIONS if moves[move]} == TRANSITIONS
    assert sum(life.decisions for life in lives) >= 100 * SEEDS
    assert sum(life.preemptions > 0 for life in lives) >= 0.3 * SEEDS
    assert sum(life.aborted_in_prefill > 0 for life in lives) >= 0.3 * SEEDS
    assert sum(life.failures > 0 for life in lives) > 0
    assert sum(life.spread > 0 for life in lives) >= 0.3 * SEEDS
    assert sum(life.cached_tokens > 0 for life in lives) >= 0.3 * SEEDS
    assert sum(life.spilled > 0 for life in lives) >= 0.15 * SEEDS
    assert sum(life.returned > 0 for life in lives) >= 0.1 * SEEDS
    assert sum(life.cancelled_copies for life in lives) > 0
    assert sum(life.evicted_pages > 0 for life in lives) >= 0.3 * SEEDS
