"""How long outputs become: learned online for each model, with what all models do as its prior."""

from __future__ import annotations

from bisect import bisect_right

from crosspool.core.ids import ModelIndex

_EDGES = [0, *sorted({round(2 ** (step / 2)) for step in range(33)})]
"""Lengths at which outputs are counted: two for each doubling, up to 65,536."""
PRIOR_MEDIAN = 256
PRIOR_WEIGHT = 8
"""The prior counts as so many outputs of a model."""
REMEMBERED = 512
"""A model's counts are halved when there are so many: it follows clients that change."""


class _Counts:
    """How many outputs were at least as long as each edge."""

    def __init__(self) -> None:
        self.total = 0.0
        self._at_least = [0.0] * (len(_EDGES) + 1)

    def add(self, tokens: int) -> None:
        if self.total >= REMEMBERED:
            self._at_least = [count / 2 for count in self._at_least]
            self.total /= 2
        self.total += 1
        for index in range(bisect_right(_EDGES, tokens)):
            self._at_least[index] += 1

    def longer(self, tokens: int) -> float:
        """How many outputs had more than ``tokens`` tokens; between two edges, as if evenly spread."""
        tokens += 1
        index = bisect_right(_EDGES, tokens) - 1
        if index + 1 == len(_EDGES):
            return self._at_least[index] * _EDGES[index] / tokens
        low, high = _EDGES[index], _EDGES[index + 1]
        share = (tokens - low) / (high - low)
        return self._at_least[index] * (1 - share) + self._at_least[index + 1] * share


class OutputLengths:
    """The distribution of each model's output lengths, from those that have ended.

    A model's prior is what all models' outputs were, and theirs is a log-logistic distribution of shape 1,
    whose tail is heavy: without history, an output of n tokens becomes twice as long in half of the cases.
    """

    def __init__(self) -> None:
        self._models: dict[ModelIndex, _Counts] = {}
        self._all = _Counts()

    def learn(self, model: ModelIndex, tokens: int) -> None:
        """An output has ended by itself."""
        self._models.setdefault(model, _Counts()).add(tokens)
        self._all.add(tokens)

    def chance_of_more(self, model: ModelIndex, made: int, more: int) -> float:
        """The chance that an output which has ``made`` tokens, and goes on, gets over ``more`` more."""
        return self._longer(model, made + more) / self._longer(model, made)

    def _longer(self, model: ModelIndex, tokens: int) -> float:
        prior = PRIOR_MEDIAN / (PRIOR_MEDIAN + tokens)
        shared = (self._all.longer(tokens) + PRIOR_WEIGHT * prior) / (self._all.total + PRIOR_WEIGHT)
        counts = self._models.get(model)
        if counts is None:
            return shared
        return (counts.longer(tokens) + PRIOR_WEIGHT * shared) / (counts.total + PRIOR_WEIGHT)
