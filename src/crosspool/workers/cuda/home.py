"""What one KV device has for all grants whose home it is: its pages, grant memory and lanes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.backends.device import Device
from crosspool.core.batch import Phase
from crosspool.core.sampling import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from crosspool.kernels.choice_fields import CHOICE_WORDS, report_words
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.geometry import LEAST_QUERIES, Geometry, buckets
from crosspool.workers.cuda.grant import GrantMemory, most_grant_bytes
from crosspool.workers.cuda.lane import Limits, Ring
from crosspool.workers.cuda.lane_pass import Route, Track, make_pass
from crosspool.workers.cuda.lanes import Lane
from crosspool.workers.cuda.room import META, Room
from crosspool.workers.cuda.sides import Sides


@dataclass(frozen=True, slots=True)
class GrantLimits:
    """The most of what may be in flight: ``decode_rows`` of a decode; ``prefill_rows`` and ``prefill_tokens``
    of a prompt chunk; ``steps`` of a grant; and ``sequences`` of all grants together."""

    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    steps: int
    sequences: int

    def passes(self, phase: Phase) -> tuple[Limits, ...]:
        """What passes are launched for."""
        if phase is Phase.DECODE:
            return tuple(Limits(rows, rows) for rows in buckets(self.decode_rows))
        rows = buckets(self.prefill_rows)[-1]
        return tuple(Limits(rows, queries) for queries in buckets(self.prefill_tokens, LEAST_QUERIES))

    def most(self, phase: Phase) -> Limits:
        if phase is Phase.DECODE:
            return Limits(self.decode_rows, self.decode_rows)
        return Limits(self.prefill_rows, self.prefill_tokens)

    @property
    def most_rows(self) -> int:
        return max(self.decode_rows, self.prefill_rows)


@dataclass(frozen=True, slots=True)
class LanesOf:
    """How many lanes there are of each phase."""

    decode: int = 2
    prefill: int = 2

    def of(self, phase: Phase) -> int:
        return self.decode if phase is Phase.DECODE else self.prefill


Runs = Collection[tuple[Geometry, Route]]
"""The geometries that run at a home, and where."""


class Home:
    """``team`` is its number among ``devices``, which are those of all teams. ``arena`` (uint8 [pages,
    page_bytes]) has the pages from ``first_page`` on."""

    def __init__(
        self,
        team: int,
        devices: Sequence[Device],
        arena: Tensor,
        first_page: int,
        runs: Runs,
        limits: GrantLimits,
        lanes: LanesOf,
        sides: Sides,
        parts: int,
    ) -> None:
        device = devices[team]
        self.team, self.device, self.first_page = team, device, first_page
        self.memory = GrantMemory(device, _grant_bytes(runs, limits))
        around = HomeSurroundings(
            arena, device.chip, device.processors, self.memory.mirror, limits.most_rows, parts
        )
        self.lanes = [
            lane
            for phase in Phase
            for lane in _make_lanes(phase, team, devices, around, runs, limits, lanes.of(phase), sides)
        ]


def _make_lanes(
    phase: Phase,
    home: int,
    devices: Sequence[Device],
    around: HomeSurroundings,
    runs: Runs,
    limits: GrantLimits,
    count: int,
    sides: Sides,
) -> list[Lane]:
    needs = _needs(phase, home, devices, around, runs, limits, sides)
    made = []
    for _ in range(count if runs else 0):
        tracks = {}
        for team, (size, zeros) in needs.items():
            device = devices[team]
            memory, at_rest = device.tensor((size,), torch.uint8), device.tensor((zeros,), torch.int32)
            tracks[team] = Track(device, device.stream(urgent=phase is Phase.DECODE), memory, at_rest)
        lane = Lane(phase, home, tracks, around, sides)
        for geometry, route in runs:
            for own in limits.passes(phase):
                lane.prepare(geometry, route, own)
        made.append(lane)
    return made


def _needs(
    phase: Phase,
    home: int,
    devices: Sequence[Device],
    around: HomeSurroundings,
    runs: Runs,
    limits: GrantLimits,
    sides: Sides,
) -> Mapping[int, tuple[int, int]]:
    """Bytes, and int32 zeros, that a lane needs on each team's device: carved once without memory."""
    needs: dict[int, tuple[int, int]] = {}
    nothing = torch.empty(0, dtype=torch.uint8, device=META)
    for geometry, route in runs:
        tracks = {team: Track(devices[team], object(), nothing, nothing) for team in route.teams}
        for own in limits.passes(phase):
            rooms = {team: Room(None) for team in route.teams}
            ring = Ring(nothing, nothing)
            make_pass(geometry, route, own, phase, around, ring, tracks, rooms, sides)
            for team, room in rooms.items():
                size, zeros = needs.get(team, (0, 1))
                needs[team] = max(size, room.used), max(zeros, room.zeros_used)
    return needs


def _grant_bytes(runs: Runs, limits: GrantLimits) -> int:
    """Enough for all that may be in flight, were every sequence as long as a model allows, and penalised."""
    most = 0
    for geometry, _ in runs:
        context, entries = geometry.spec.max_context, geometry.groups * geometry.most_chunks
        listed = CHOICE_WORDS + MAX_STOP_TOKEN_IDS + len(geometry.spec.eos_token_ids)
        listed += limits.steps * report_words(MAX_LOGPROBS) + 2 * (context + limits.steps)
        most = max(most, most_grant_bytes(1, entries, limits.prefill_tokens, listed))
    return most * limits.sequences
