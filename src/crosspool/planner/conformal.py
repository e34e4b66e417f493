"""By how much an estimate is to be scaled, from how far it was off in past windows.

The score of a past window is its need over what was estimated from the time before it. The factor is a
quantile of the scores (split conformal prediction; Vovk et al. 2005), weighted (Tibshirani et al. 2019) by
how much of a window is its own where windows overlap. While there are few, scores that windows of many
traces had stand in: the weight of PRIOR_WINDOWS of them, log-normal with a deviation of PRIOR_DEVIATION.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from crosspool.planner.clusters import LONGEST
from crosspool.planner.estimate import estimate
from crosspool.planner.history import History
from crosspool.planner.quantiles import weighted
from crosspool.planner.trace import HOUR

PRIOR_WINDOWS = 8
PRIOR_DEVIATION = 0.5
PRIOR_POINTS = 200
"""The prior's windows are spread over so many scores, so that its quantiles have no steps."""
STEPS_PER_WINDOW = 2
"""Past windows begin so much apart, as a part of their length."""
LEAST_PARTS = 4
"""The whole past is at least so many times as long as a past window."""


@dataclass(frozen=True, slots=True)
class PastWindow:
    """An estimate from [begin, middle) and what [middle, end) needed: seconds and bytes."""

    begin: float
    middle: float
    end: float
    estimated: float
    need: float

    @property
    def score(self) -> float:
        return self.need / self.estimated


def past_windows(history: History, hours: float, risk: float, end: float) -> Iterator[PastWindow]:
    """Pairs of windows within [0, end), fitted and judged for ``hours`` each, or for less if the past is
    short. A pair without requests in either is left out."""
    length = min(hours * HOUR, end / LEAST_PARTS) // LONGEST * LONGEST
    step = max(LONGEST, length / STEPS_PER_WINDOW // LONGEST * LONGEST)
    middle = length
    while length > 0 and middle + length <= end:
        window = history.window(middle - length, middle)
        need = history.need(middle, middle + length, risk)
        estimated = float(estimate(window, [1 - risk]).upper()[0])
        if estimated > 0 and need > 0:
            yield PastWindow(middle - length, middle, middle + length, estimated, need)
        middle += step


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scores of past windows, and the weight of each beside the prior's."""

    windows: tuple[PastWindow, ...]

    def factor(self, confidence: float) -> float:
        """What to multiply an estimate by, so that it covers the need with this probability."""
        return scaled_by([window.score for window in self.windows], confidence)

    def achieved(self, confidence: float) -> tuple[int, int]:
        """In how many past windows the pool would have been enough, of how many.

        Each is judged with the factor that the windows which had ended before it began give.
        """
        held = 0
        for window in self.windows:
            known = [past.score for past in self.windows if past.end <= window.middle]
            held += window.score <= scaled_by(known, confidence)
        return held, len(self.windows)


def scaled_by(scores: Sequence[float], confidence: float) -> float:
    """The factor that scores of past windows give."""
    ranks = (np.arange(PRIOR_POINTS) + 0.5) / PRIOR_POINTS
    prior = np.exp(PRIOR_DEVIATION * norm.ppf(ranks))
    weights = np.concatenate(
        (np.full(PRIOR_POINTS, PRIOR_WINDOWS / PRIOR_POINTS), np.full(len(scores), 1 / STEPS_PER_WINDOW))
    )
    return weighted(np.concatenate((prior, scores)), weights, confidence)
