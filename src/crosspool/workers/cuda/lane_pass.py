"""A pass in a lane: what each team puts into its stream, half by half, and what crosses between them.

Home and weights devices that are the same have one stream, whose order is all that is needed. Otherwise
hidden states cross to the device that computes a half, and back (crossing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from crosspool.backends.device import Graph
from crosspool.core.batch import Phase
from crosspool.kernels.triton.words import AGAIN, LANE_WORDS
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.crossing import Crossing, Port, Track, Way, make_crossing
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import HiddenStates, Limits, Ring
from crosspool.workers.cuda.room import Room
from crosspool.workers.cuda.sides import AttentionSide, FfnSide, Sides


@dataclass(frozen=True, slots=True)
class Route:
    """Where the halves of a geometry's layers are: ``home`` and, of each layer, the teams that make a part of
    its FFN, in the order in which parts are added."""

    home: int
    ffns: tuple[tuple[int, ...], ...]

    @property
    def teams(self) -> tuple[int, ...]:
        """All of them, the home first."""
        return tuple(dict.fromkeys((self.home, *(team for layer in self.ffns for team in layer))))

    @property
    def at_home(self) -> bool:
        """Whether one device does it all."""
        return self.teams == (self.home,)

    def part(self, team: int) -> tuple[int, int]:
        """Which part of how many it makes of those FFNs that it has a part of."""
        layer = next(layer for layer in self.ffns if team in layer)
        return layer.index(team), len(layer)


class Launch(NamedTuple):
    """Something that a team puts into its stream."""

    team: int
    put: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Remote:
    """The FFN side of a pass on a device that is not its home: what computes [T, H] of ``input`` to
    ``output``, and how they cross. ``begins`` is its first layer, which tells it how large the pass is."""

    port: Port
    side: FfnSide
    input: Tensor
    output: Tensor
    begins: int
    first: Crossing
    there: Crossing
    back: Crossing

    def crossing(self, layer: int) -> Crossing:
        return self.first if layer == self.begins else self.there

    def launches(self, layer: int) -> Iterator[Launch]:
        team, track = self.port.team, self.port.track
        yield Launch(team, self.crossing(layer).receive)
        launches = partial(self.side.ffn, layer, self.input, self.output)
        yield Launch(team, partial(track.device.run, track.stream, launches))
        yield Launch(team, self.back.send)


@dataclass
class LanePass:
    """Passes of one geometry, within limits, in one lane. Once ``record``\\ ed, launches go as graphs: one of
    each team that runs by itself, and the home's of all the others. If it ``loops``, ``run`` makes as many
    passes as the grant's host lets it (Flight)."""

    geometry: Geometry
    route: Route
    home: Port
    attention_side: AttentionSide
    ffn_at_home: FfnSide | None
    remotes: Mapping[int, Remote]
    sides: Sides
    loops: bool = False
    _graphs: list[tuple[Track, Graph]] = field(default_factory=list)

    def run(self) -> None:
        """All of a pass that has a head."""
        if not self._graphs:
            _put(self._everything())
        for track, graph in self._graphs:
            track.device.replay(track.stream, graph)

    def attention(self, layer: int) -> None:
        """The attention half of a layer; that of the first begins the pass."""
        _put(self._attention_launches(layer))

    def ffn(self, layer: int) -> None:
        """The FFN half of a layer, on all devices that have a part of it."""
        _put(self._ffn_launches(layer))

    def head(self) -> None:
        _put([self._at_home(self.attention_side.head)])

    def end(self) -> None:
        """Of a pass without head."""
        _put([self._at_home(self.attention_side.end)])

    def record(self) -> None:
        """Record graphs, or where the home does it all a loop, if its device has them. What they launch is
        launched once before, by one team after another, so nobody may wait: the lane is as if it had failed,
        until ``settle`` says otherwise."""
        self.settle(failed=True)
        launches = list(self._everything())
        self.loops = self.route.at_home and self.home.track.device.loops
        if self.loops:
            self._record_loop(launches)
            return
        leader = {team: team if team in self._alone else self.home.team for team in self.route.teams}
        for team in dict.fromkeys(leader.values()):
            track = self._ports[team].track
            own = [one for one in launches if leader[one.team] == team]
            self._graphs.append((track, track.device.capture(track.stream, partial(_put, own))))

    def _record_loop(self, launches: Iterable[Launch]) -> None:
        track, side = self.home.track, self.attention_side
        again = side.lane[AGAIN : AGAIN + 1]
        loop = track.device.loop(track.stream, side.ask_again, partial(_put, launches), again)
        self._graphs.append((track, loop))

    def settle(self, *, failed: bool) -> None:
        """The other teams' streams have followed the home's, and it follows them: nothing crosses now, nor is
        to be waited for. Unless it has ``failed``, what comes into the streams crosses again."""
        home = self.home.track
        for team in self._alone:
            self._settle(self._ports[team], failed)
        for remote in self.remotes.values():
            home.device.follow(home.stream, remote.port.track.stream)
        if self._alone:
            self._settle(self.home, failed)

    def _settle(self, port: Port, failed: bool) -> None:
        track = port.track
        launch = partial(self.sides.settle, port.words, track.flags, failed=failed)
        track.device.run(track.stream, launch)

    @property
    def _ports(self) -> dict[int, Port]:
        return {self.home.team: self.home} | {team: own.port for team, own in self.remotes.items()}

    @property
    def _alone(self) -> list[int]:
        """The teams that wait for the home by themselves."""
        return [team for team, own in self.remotes.items() if own.port.track.way is Way.STORES]

    def _everything(self) -> Iterator[Launch]:
        for layer in range(self.geometry.num_layers):
            yield from self._attention_launches(layer)
            yield from self._ffn_launches(layer)
        yield self._at_home(self.attention_side.head)

    def _attention_launches(self, layer: int) -> Iterator[Launch]:
        if layer == 0:
            yield self._at_home(self.attention_side.begin)
        yield self._at_home(partial(self.attention_side.attention, layer))

    def _ffn_launches(self, layer: int) -> Iterator[Launch]:
        """The home's own part runs while the others compute theirs."""
        home, teams, hidden = self.home.team, self.route.ffns[layer], self.attention_side.hidden
        elsewhere = [self.remotes[team] for team in teams if team != home]
        for remote in elsewhere:
            yield Launch(home, remote.crossing(layer).send)
        for remote in elsewhere:
            yield from remote.launches(layer)
        if home in teams:
            assert self.ffn_at_home is not None
            output = hidden.outputs[teams.index(home)]
            yield self._at_home(partial(self.ffn_at_home.ffn, layer, hidden.normed, output))
        for remote in elsewhere:
            yield Launch(home, remote.back.receive)

    def _at_home(self, launches: Callable[[], object]) -> Launch:
        track = self.home.track
        return Launch(self.home.team, partial(track.device.run, track.stream, launches))


def _put(launches: Iterable[Launch]) -> None:
    for one in launches:
        one.put()


def make_pass(
    geometry: Geometry,
    route: Route,
    limits: Limits,
    phase: Phase,
    around: HomeSurroundings,
    ring: Ring,
    tracks: Mapping[int, Track],
    rooms: Mapping[int, Room],
    sides: Sides,
) -> LanePass:
    """``rooms`` are one of each team of the route; what is carved from them tells how large they must be."""
    team, queries = route.home, limits.queries
    attention = sides.attention(geometry, limits, phase, around, ring, rooms[team])
    home, ffn_at_home = Port(team, tracks[team], attention.lane), None
    if any(team in layer for layer in route.ffns):
        chip = tracks[team].device.chip
        ffn_at_home = sides.ffn(geometry, queries, *route.part(team), chip, attention.lane, rooms[team])
    remotes = {
        team: _make_remote(
            geometry, route, queries, home, attention.hidden, team, tracks[team], rooms[team], sides
        )
        for team in route.teams[1:]
    }
    return LanePass(geometry, route, home, attention, ffn_at_home, remotes, sides)


def _make_remote(
    geometry: Geometry,
    route: Route,
    queries: int,
    home: Port,
    hidden: HiddenStates,
    team: int,
    track: Track,
    room: Room,
    sides: Sides,
) -> Remote:
    port = Port(team, track, room.take((LANE_WORDS,), torch.int64))
    part, parts = route.part(team)
    source, target = hidden.normed, hidden.outputs[part]
    ins, out = source, target
    if track.way is not Way.SHARED:
        ins, out = (room.take(source.shape, source.dtype) for _ in range(2))
    cross = partial(make_crossing, track.way, flags=sides)
    return Remote(
        port,
        sides.ffn(geometry, queries, part, parts, track.device.chip, port.words, room),
        ins,
        out,
        next(layer for layer, teams in enumerate(route.ffns) if team in teams),
        first=cross(home, port, [(ins, source)], tells=True),
        there=cross(home, port, [(ins, source)], tells=False),
        back=cross(port, home, [(target, out)], tells=False),
    )
