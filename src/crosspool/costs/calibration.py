"""Corrects predicted times by measured ones, of layers for each model, phase and size of the work.

What a machine makes of many tokens says little of what it makes of few: there operations count, here bytes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from crosspool.core.batch import Half, Phase
from crosspool.core.ids import ModelIndex, Nanoseconds

SMOOTHING = 0.2
"""Weight of the newest measurement, at least. Earlier on it is a plain mean: the first measurement of all has
the whole weight, and is often disturbed by cold caches."""


@dataclass(slots=True)
class Ratio:
    """Smoothed ratio of measured to predicted time. 1 until something was measured."""

    value: float = 1.0
    samples: int = 0

    def correct(self, predicted: int) -> Nanoseconds:
        return Nanoseconds(int(predicted * self.value))

    def learn(self, predicted: int, measured: int) -> None:
        """``predicted`` is the uncorrected prediction. Times of 0 (nothing ran) teach nothing."""
        if predicted <= 0 or measured <= 0:
            return
        self.samples += 1
        self.value += max(SMOOTHING, 1 / self.samples) * (measured / predicted - self.value)


class Calibration:
    """The ratio of every kind of layer task, apart for each doubling of its tokens. Where nothing was
    measured, that of the nearest size holds."""

    def __init__(self) -> None:
        self._ratios: defaultdict[tuple[ModelIndex, Phase, Half], dict[int, Ratio]] = defaultdict(dict)

    def correct(
        self, model: ModelIndex, phase: Phase, half: Half, tokens: int, predicted: int
    ) -> Nanoseconds:
        sizes, size = self._ratios[model, phase, half], tokens.bit_length()
        if not sizes:
            return Nanoseconds(predicted)
        ratio = sizes.get(size) or sizes[min(sizes, key=lambda known: abs(known - size))]
        return ratio.correct(predicted)

    def learn(
        self, model: ModelIndex, phase: Phase, half: Half, tokens: int, predicted: int, measured: int
    ) -> None:
        """``predicted`` is the uncorrected prediction. Times of 0 (nothing ran) teach nothing."""
        if predicted > 0 and measured > 0:
            sizes = self._ratios[model, phase, half]
            sizes.setdefault(tokens.bit_length(), Ratio()).learn(predicted, measured)
