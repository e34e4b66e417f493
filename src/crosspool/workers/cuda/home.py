"""What one KV device has for all grants whose home it is: its pages, grant memory and lanes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosspool.backends.device import Device
from crosspool.core.batch import Phase
from crosspool.core.sampling import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from crosspool.kernels.choice_fields import CHOICE_WORDS, report_words
from crosspool.kernels.triton.crossing import FLAG_WORDS
from crosspool.workers.cuda.attention import HomeSurroundings, KvPages
from crosspool.workers.cuda.crossing import Track, Way, way_between
from crosspool.workers.cuda.geometry import LEAST_QUERIES, Geometry, buckets
from crosspool.workers.cuda.grant import GrantMemory, most_grant_bytes, put_idle_grant
from crosspool.workers.cuda.lane import Limits, Ring
from crosspool.workers.cuda.lane_pass import LanePass, Route, make_pass
from crosspool.workers.cuda.lanes import Lane
from crosspool.workers.cuda.model import DeviceModel
from crosspool.workers.cuda.room import META, Room
from crosspool.workers.cuda.sides import Sides, TritonSides


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


_log = logging.getLogger(__name__)

IDLE_BYTES = 1 << 20
"""For grants that compute nothing: a few hundred bytes of each lane and geometry."""

Key = tuple[Geometry, Route]
"""What models have in common that share recorded graphs."""

Prepared = Callable[[int, int], None]
"""Told how many of how many passes are prepared."""


@dataclass(frozen=True, slots=True)
class HomePlan:
    """What there is to be at a home: ``team`` is its number among the ``devices`` of all teams, ``keys`` what
    its models are. Each FFN is made in ``parts``."""

    team: int
    devices: Sequence[Device]
    keys: Collection[Key]
    limits: GrantLimits
    parts: int
    lanes: LanesOf = LanesOf()
    sides: Sides = field(default_factory=TritonSides)

    def around(self, arena: Tensor, mirror: int, others: Mapping[int, KvPages]) -> HomeSurroundings:
        device, most_rows = self.devices[self.team], self.limits.most_rows
        return HomeSurroundings(arena, device.chip, device.processors, mirror, most_rows, self.parts, others)

    @property
    def grant_bytes(self) -> int:
        """Enough for all that may be in flight, were every sequence as long as a model allows, and
        penalised."""
        limits, most = self.limits, 0
        for geometry, _ in self.keys:
            context, entries = geometry.spec.max_context, geometry.groups * geometry.most_chunks
            listed = CHOICE_WORDS + MAX_STOP_TOKEN_IDS + len(geometry.spec.eos_token_ids)
            listed += limits.steps * report_words(MAX_LOGPROBS) + 2 * (context + limits.steps)
            most = max(most, most_grant_bytes(1, entries, limits.prefill_tokens, listed))
        return most * limits.sequences + IDLE_BYTES

    def lane_needs(self, phase: Phase) -> Mapping[int, tuple[int, int]]:
        """Bytes, and int32 zeros, that a lane needs on each team's device: carved once without memory."""
        needs: dict[int, tuple[int, int]] = {}
        nothing = torch.empty(0, dtype=torch.uint8, device=META)
        others = {team: KvPages(nothing, 0) for _, route in self.keys for team in route.others}
        around, ring = self.around(nothing, 0, others), Ring(nothing, nothing)
        for geometry, route in self.keys:
            tracks = {
                team: Track(self.devices[team], object(), nothing, nothing, nothing, self.way(team, phase))
                for team in route.teams
            }
            for limits in self.limits.passes(phase):
                rooms = {team: Room(None) for team in route.teams}
                make_pass(geometry, route, limits, phase, around, ring, tracks, rooms, self.sides)
                for team, room in rooms.items():
                    size, zeros = needs.get(team, (0, 1))
                    needs[team] = max(size, room.used), max(zeros, room.zeros_used)
        return needs

    def device_bytes(self) -> Mapping[int, int]:
        """What grants and lanes take of each team's device."""
        taken = {self.team: self.grant_bytes}
        for phase in Phase:
            for team, (size, zeros) in self.lane_needs(phase).items():
                own = size + 4 * zeros + 8 * FLAG_WORDS * len(self.devices)
                taken[team] = taken.get(team, 0) + self.lanes.of(phase) * own
        return taken

    def way(self, team: int, phase: Phase) -> Way:
        """How what crosses between the home and another team does. Of teams on one chip none waits by itself:
        it could be in front of another that the home waits for."""
        way = way_between(self.devices[self.team], self.devices[team], phase)
        chip = self.devices[team].physical
        alone = sum(device.physical == chip for device in self.devices) == 1
        return way if way is not Way.STORES or alone else Way.STAGED


class Home:
    """``kv`` are the pages of every KV device that its sequences may have some on, by their teams; ``models``
    are one of each key. Everything is allocated and recorded here."""

    def __init__(
        self,
        plan: HomePlan,
        kv: Mapping[int, KvPages],
        models: Mapping[Key, DeviceModel],
        prepared: Prepared = lambda done, total: None,
    ) -> None:
        self.team, self.pages = plan.team, kv[plan.team].numbers
        self.memory = GrantMemory(plan.devices[plan.team], plan.grant_bytes)
        around = plan.around(kv[plan.team].arena, self.memory.mirror, kv)
        self.lanes = [lane for phase in Phase for lane in _make_lanes(plan, phase, around)]
        total = sum(len(models) * len(plan.limits.passes(lane.phase)) for lane in self.lanes)
        done = 0
        compiled: set[Phase] = set()
        for lane in self.lanes:
            for (geometry, route), model in models.items():
                enter = self._idle(lane, model)
                for limits in plan.limits.passes(lane.phase):
                    lane.prepare(geometry, route, limits, enter, warm=lane.phase not in compiled)
                    done += 1
                    prepared(done, total)
            compiled.add(lane.phase)

    def _idle(self, lane: Lane, model: DeviceModel) -> Callable[[LanePass], None]:
        """Leads a lane to a grant of the model that computes nothing."""
        address, target, source = put_idle_grant(self.memory, model.lane_words(lane.home))
        lane.track.device.copy(lane.track.stream, target, source)
        return lambda lane_pass: lane.enter(lane_pass, address, model)


def _make_lanes(plan: HomePlan, phase: Phase, around: HomeSurroundings) -> list[Lane]:
    needs, made = plan.lane_needs(phase), []
    ways = {team: plan.way(team, phase) for team in needs}
    for team, way in ways.items():
        if team != plan.team:
            names = plan.devices[plan.team].name, plan.devices[team].name
            what = f"hidden states of a {phase.name.lower()}"
            _log.info("%s cross between %s and %s by %s", what, *names, way.value)
    for _ in range(plan.lanes.of(phase) if needs else 0):
        tracks = {}
        for team, (size, zeros) in needs.items():
            device = plan.devices[team]
            memory, at_rest = device.tensor((size,), torch.uint8), device.tensor((zeros,), torch.int32)
            flags = device.tensor((len(plan.devices), FLAG_WORDS), torch.int64)
            stream = device.stream(urgent=phase is Phase.DECODE)
            tracks[team] = Track(device, stream, memory, at_rest, flags, ways[team])
        made.append(Lane(phase, plan.team, tracks, around, plan.sides))
    return made
