"""Corrects predicted layer times by measured ones, for each model and phase."""

from __future__ import annotations

from crosspool.core.batch import Half, Phase
from crosspool.core.ids import ModelIndex, Nanoseconds

SMOOTHING = 0.2
"""Weight of the newest measurement: a few tasks settle it, one disturbed task does not upset it."""


class Calibration:
    """Smoothed ratio of measured to predicted time. 1 until something was measured."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[ModelIndex, Phase, Half], float] = {}

    def correct(self, model: ModelIndex, phase: Phase, half: Half, predicted: int) -> Nanoseconds:
        return Nanoseconds(int(predicted * self._ratios.get((model, phase, half), 1.0)))

    def learn(self, model: ModelIndex, phase: Phase, half: Half, predicted: int, measured: int) -> None:
        """``predicted`` is the uncorrected prediction. Times of 0 (nothing ran) teach nothing."""
        if predicted <= 0 or measured <= 0:
            return
        key, ratio = (model, phase, half), measured / predicted
        old = self._ratios.get(key)
        self._ratios[key] = ratio if old is None else old + SMOOTHING * (ratio - old)
