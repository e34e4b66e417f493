"""Corrects predicted layer times by measured ones, for each model and phase."""

from __future__ import annotations

from crosspool.core.batch import Half, Phase
from crosspool.core.ids import ModelIndex, Nanoseconds

SMOOTHING = 0.2
"""Weight of the newest measurement, at least. Earlier on it is a plain mean: the first measurement of all has
the whole weight, and is often disturbed by cold caches."""


class Calibration:
    """Smoothed ratio of measured to predicted time. 1 until something was measured."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[ModelIndex, Phase, Half], tuple[float, int]] = {}

    def correct(self, model: ModelIndex, phase: Phase, half: Half, predicted: int) -> Nanoseconds:
        ratio, _ = self._ratios.get((model, phase, half), (1.0, 0))
        return Nanoseconds(int(predicted * ratio))

    def learn(self, model: ModelIndex, phase: Phase, half: Half, predicted: int, measured: int) -> None:
        """``predicted`` is the uncorrected prediction. Times of 0 (nothing ran) teach nothing."""
        if predicted <= 0 or measured <= 0:
            return
        key = (model, phase, half)
        ratio, samples = self._ratios.get(key, (0.0, 0))
        weight = max(SMOOTHING, 1 / (samples + 1))
        self._ratios[key] = (ratio + weight * (measured / predicted - ratio), samples + 1)
