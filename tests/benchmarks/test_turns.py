"""What is made of turns: pairs, medians, shares of what the machine gave beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from peers.turns import Measured, Result, Turn, take_turns

pytestmark = pytest.mark.unit


class CountingLimit:
    """A machine whose bandwidth is 1, 2, 3 ... with one thread, and twice that with two."""

    def __init__(self) -> None:
        self.windows = 0

    def window(self) -> dict[int, float]:
        self.windows += 1
        return {1: float(self.windows), 2: 2.0 * self.windows}


def result_of(figure: str, *rounds: tuple[float, float]) -> Result:
    """Figures of A and B in each round."""
    turns = [
        Turn(name, number, Measured({figure: value}), {1: 1.0})
        for number, pair in enumerate(rounds)
        for name, value in zip("AB", pair, strict=True)
    ]
    return Result("some", "thing", tuple(turns))


def test_ratios_are_those_of_one_round() -> None:
    """A is twice as fast in every round, though the machine's speed makes each median its own round's."""
    result = result_of("tokens_per_second", (2, 1), (200, 100), (20, 10), (6, 30))
    assert result.ratios("A", "B") == {"tokens_per_second": 2}
    medians = [result.medians(name)["tokens_per_second"] for name in "AB"]
    assert medians == [13, 20]


def test_times_are_better_when_shorter() -> None:
    result = result_of("ttft_ms", (5, 10), (5, 20), (5, 15))
    assert result.ratios("A", "B") == {"ttft_ms": 3}
    assert result.ratios("B", "A") == {"ttft_ms": pytest.approx(1 / 3)}


def test_no_ratio_to_nothing() -> None:
    assert math.isnan(result_of("tokens_per_second", (1, 0)).ratios("A", "B")["tokens_per_second"])


def test_percentiles_are_of_all_turns_together() -> None:
    turns = [
        Turn(name, number, Measured({}, {"tbt_ms": [scale * gap for gap in gaps]}), {1: 1.0})
        for number, gaps in enumerate(([1.0] * 50, [1.0] * 49 + [100.0]))
        for name, scale in (("A", 1.0), ("B", 3.0))
    ]
    result = Result("some", "thing", tuple(turns))
    medians = result.medians("A")
    assert medians["tbt_ms_p50"] == 1
    assert 1 < medians["tbt_ms_p99"] < 100
    assert medians["tbt_ms_max"] == 100
    assert result.ratios("A", "B")["tbt_ms_p99"] == pytest.approx(3)


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def turns(calls: list[tuple[str, int]]) -> Iterator[tuple[Turn, ...]]:
    def measure(name: str, number: int) -> Measured:
        calls.append((name, number))
        return Measured({"bytes_per_second": 3.0})

    measures = {name: (lambda number, name=name: measure(name, number)) for name in "AB"}
    return take_turns(measures, 2, CountingLimit())


def test_another_one_begins_each_round(turns: tuple[Turn, ...], calls: list[tuple[str, int]]) -> None:
    warm_up = [("A", 2), ("B", 2)]
    assert calls == [*warm_up, ("A", 0), ("B", 0), ("B", 1), ("A", 1)]
    assert [(turn.contender, turn.round) for turn in turns] == calls[2:]


def test_bandwidth_is_the_mean_of_before_and_after(turns: tuple[Turn, ...]) -> None:
    assert [turn.bandwidth for turn in turns] == [{1: n + 0.5, 2: 2 * n + 1.0} for n in (1, 2, 3, 4)]
    assert [turn.values["read_bandwidth_share"] for turn in turns] == [1, 3 / 5, 3 / 7, 3 / 9]
