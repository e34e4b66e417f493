from __future__ import annotations

import numpy as np
import pytest

from crosspool.planner.conformal import (
    PRIOR_DEVIATION,
    Calibration,
    PastWindow,
    past_windows,
    scaled_by,
)
from crosspool.planner.trace import HOUR
from helpers_traces import history_of, one_page_trace, poisson_starts

pytestmark = pytest.mark.unit


def windows(scores: list[float]) -> tuple[PastWindow, ...]:
    return tuple(PastWindow(i, i + 1, i + 2, 10.0, 10.0 * score) for i, score in enumerate(scores))


def test_without_a_past_the_prior_scales() -> None:
    assert scaled_by([], 0.5) < 1.1 and scaled_by([], 0.5) > 0.9
    assert scaled_by([], 0.9) == pytest.approx(np.exp(PRIOR_DEVIATION * 1.2816), rel=0.02)
    assert scaled_by([], 0.99) > scaled_by([], 0.9) > scaled_by([], 0.5)


@pytest.mark.parametrize("score", [0.4, 1.0, 3.0])
def test_many_windows_outweigh_the_prior(score: float) -> None:
    assert Calibration(windows([score] * 500)).factor(0.9) == score


def test_the_factor_is_the_quantile_of_the_scores() -> None:
    scores = np.random.default_rng(0).lognormal(0.3, 0.6, 4000)
    assert Calibration(windows(scores.tolist())).factor(0.9) == pytest.approx(
        np.quantile(scores, 0.9), rel=0.05
    )


def test_coverage_is_judged_with_what_was_known_before() -> None:
    # The prior's factor covers 1 and not 100; what later windows say does not help earlier ones.
    assert Calibration(windows([1.0, 1.0, 100.0])).achieved(0.9) == (2, 3)
    assert Calibration(windows([100.0] * 200)).achieved(0.9)[0] > 150
    early = Calibration(windows([100.0, 100.0]))
    assert early.achieved(0.9) == (0, 2)


def test_coverage_of_independent_windows_is_the_confidence() -> None:
    rng = np.random.default_rng(8)
    held, of = Calibration(windows(rng.lognormal(0.5, 0.8, 1500).tolist())).achieved(0.8)
    assert held / of == pytest.approx(0.8, abs=0.03)


def test_past_windows_end_before_now() -> None:
    hours = 40.0
    starts = poisson_starts(np.random.default_rng(2), [20.0] * 4, hours)
    history = history_of(one_page_trace(starts, hours))
    found = list(past_windows(history, 24, 0.01, 32.2 * HOUR))
    assert [window.middle / HOUR for window in found] == [8, 12, 16, 20, 24]
    assert all(window.end <= 32.2 * HOUR and window.end - window.middle == 8 * HOUR for window in found)
    assert all(0.3 < window.score < 3 for window in found)
    assert found[0].need == history.need(8 * HOUR, 16 * HOUR, 0.01)
    assert list(past_windows(history, 24, 0.01, 1.9 * HOUR)) == []
    assert [w.middle / HOUR for w in past_windows(history, 2, 0.01, 9 * HOUR)] == [2, 3, 4, 5, 6, 7]


def test_what_comes_later_changes_nothing() -> None:
    rng, hours = np.random.default_rng(4), 16.0
    starts = poisson_starts(rng, [30.0] * 3, hours)
    quiet = [some[some < 8 * HOUR] for some in starts]
    scores = [
        [w.score for w in past_windows(history_of(one_page_trace(some, hours)), 2, 0.01, 8 * HOUR)]
        for some in (starts, quiet)
    ]
    assert len(scores[0]) == 5 and scores[0] == scores[1]
