"""Contenders measured in turns, A B A B, with the read bandwidth before and after each turn."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from peers.bandwidth import ReadBandwidth

Measure: TypeAlias = Callable[[int], "Measured"]
"""One turn of one contender, given the number of the round, which seeds its prompts."""

HIGHER_IS_BETTER = ("_per_second", "_ratio", "_share", "finished")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one turn gave. ``values`` are single figures by name; ``pools`` many of a kind, such as gaps in
    milliseconds, whose percentiles are taken over all turns together."""

    values: Mapping[str, float]
    pools: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn with the read bandwidth beside it: bytes per second by number of threads."""

    contender: str
    round: int
    measured: Measured
    bandwidth: Mapping[int, float]

    @property
    def values(self) -> dict[str, float]:
        """The figures, and for bytes read per second their share of the most that was read beside it."""
        values = dict(self.measured.values)
        if "bytes_per_second" in values:
            values["read_bandwidth_share"] = values["bytes_per_second"] / max(self.bandwidth.values())
        return values


@dataclass(frozen=True, slots=True)
class Result:
    """All turns of one experiment on one subject: a checkpoint, or what else it was about."""

    experiment: str
    subject: str
    turns: tuple[Turn, ...]
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of each contender, how its servers were started."""

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(turn.contender for turn in self.turns))

    def of(self, contender: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.contender == contender]

    def medians(self, contender: str) -> dict[str, float]:
        """Median of each figure over the turns, and percentiles of each pool over all turns together."""
        turns = self.of(contender)
        figures = {name: statistics.median(turn.values[name] for turn in turns) for name in turns[0].values}
        for name in turns[0].measured.pools:
            pool = np.concatenate([np.asarray(turn.measured.pools[name]) for turn in turns])
            if pool.size:
                figures[f"{name}_p50"], figures[f"{name}_p99"] = np.percentile(pool, (50, 99)).tolist()
                figures[f"{name}_max"] = float(pool.max())
        return figures

    def ratios(self, first: str, other: str) -> dict[str, float]:
        """How much better ``first`` is than ``other``: medians of the ratios of turns of one round.

        Figures whose names end as HIGHER_IS_BETTER has it are divided by the other's; of all others, which
        are times and bytes, the other's is divided. Pools have no pairs: their percentiles are divided.
        """
        pairs = [
            (one.values, two.values)
            for one in self.of(first)
            for two in self.of(other)
            if one.round == two.round
        ]
        result = {
            name: statistics.median(_better(name, one[name], two[name]) for one, two in pairs)
            for name in pairs[0][0]
        }
        mine, theirs = self.medians(first), self.medians(other)
        for name in mine:
            if name not in result and name in theirs:
                result[name] = _better(name, mine[name], theirs[name])
        return result


def _better(name: str, mine: float, theirs: float) -> float:
    above, below = (mine, theirs) if name.endswith(HIGHER_IS_BETTER) else (theirs, mine)
    return above / below if below else float("nan")


def take_turns(
    measures: Mapping[str, Measure], rounds: int, limit: ReadBandwidth, *, warm_up: bool = True
) -> tuple[Turn, ...]:
    """Measure every contender once a round, another one first each time.

    ``warm_up``: a round before the first is thrown away. A turn's bandwidth is the mean of those measured
    right before and right after it.
    """
    names, turns = list(measures), []
    if warm_up:
        for name in names:
            measures[name](rounds)
    before = limit.window()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            measured = measures[name](number)
            after = limit.window()
            beside = {threads: (before[threads] + after[threads]) / 2 for threads in before}
            turns.append(Turn(name, number, measured, beside))
            before = after
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return tuple(turns)
