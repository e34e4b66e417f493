"""A pass in a lane: what each team puts into its stream, half by half, and what crosses between them.

Home and weights devices that are the same have one stream, whose order is all that is needed. Otherwise what
a half is made from crosses to the device that computes it, and what it has made crosses back (elsewhere.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from crosspool.backends.device import Graph
from crosspool.core.batch import Phase
from crosspool.kernels.triton.words import AGAIN, LANE_WORDS
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.crossing import Port, Track, Way
from crosspool.workers.cuda.elsewhere import Elsewhere, Launch, attention_elsewhere, ffn_elsewhere
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, Ring
from crosspool.workers.cuda.room import Room
from crosspool.workers.cuda.sides import AttentionSide, FfnSide, Sides, SpreadSide


@dataclass(frozen=True, slots=True)
class Route:
    """Where the halves of a geometry's layers are: ``home`` and, of each layer, the teams that make a part of
    its FFN, in the order in which parts are added. If contexts may lie on several KV devices, ``kv`` are
    their teams, in the order in which states are merged; otherwise nobody."""

    home: int
    ffns: tuple[tuple[int, ...], ...]
    kv: tuple[int, ...] = ()

    @property
    def teams(self) -> tuple[int, ...]:
        """All of them, the home first."""
        ffns = (team for layer in self.ffns for team in layer)
        return tuple(dict.fromkeys((self.home, *ffns, *self.kv)))

    @property
    def others(self) -> tuple[int, ...]:
        """The KV devices that are not its home."""
        return tuple(team for team in self.kv if team != self.home)

    @property
    def at_home(self) -> bool:
        """Whether one device does it all."""
        return self.teams == (self.home,)

    def begins(self, team: int) -> int | None:
        """The first layer of whose FFN the team makes a part, if there is one."""
        return next((layer for layer, teams in enumerate(self.ffns) if team in teams), None)

    def part(self, team: int) -> tuple[int, int]:
        """Which part of how many it makes of those FFNs that it has a part of."""
        layer = next(layer for layer in self.ffns if team in layer)
        return layer.index(team), len(layer)


@dataclass
class LanePass:
    """Passes of one geometry, within limits, in one lane. Once ``record``\\ ed, launches go as graphs: one of
    each team that runs by itself, and the home's of all the others. If it ``loops``, ``run`` makes as many
    passes as the grant's host lets it (Flight).

    ``ports`` are of all teams, the home's first. ``ffns`` are FFN sides elsewhere; ``spread`` and
    ``attends`` are the home and the other KV devices of contexts on several of them."""

    geometry: Geometry
    route: Route
    ports: Mapping[int, Port]
    attention_side: AttentionSide
    ffn_at_home: FfnSide | None
    ffns: Mapping[int, Elsewhere]
    spread: SpreadSide | None
    attends: Sequence[Elsewhere]
    sides: Sides
    loops: bool = False
    _graphs: list[tuple[Track, Graph]] = field(default_factory=list)

    @property
    def home(self) -> Port:
        return self.ports[self.route.home]

    @property
    def others(self) -> list[Port]:
        return [port for port in self.ports.values() if port is not self.home]

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
        leader = {team: team if port in self._alone else self.home.team for team, port in self.ports.items()}
        for team in dict.fromkeys(leader.values()):
            track = self.ports[team].track
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
        for port in self._alone:
            self._settle(port, failed)
        for port in self.others:
            home.device.follow(home.stream, port.track.stream)
        if self._alone:
            self._settle(self.home, failed)

    def _settle(self, port: Port, failed: bool) -> None:
        track = port.track
        launch = partial(self.sides.settle, port.words, track.flags, failed=failed)
        track.device.run(track.stream, launch)

    @property
    def _alone(self) -> list[Port]:
        """Those of teams that wait for the home by themselves."""
        return [port for port in self.others if port.track.way is Way.STORES]

    def _everything(self) -> Iterator[Launch]:
        for layer in range(self.geometry.num_layers):
            yield from self._attention_launches(layer)
            yield from self._ffn_launches(layer)
        yield self._at_home(self.attention_side.head)

    def _attention_launches(self, layer: int) -> Iterator[Launch]:
        if layer == 0:
            yield self._at_home(self.attention_side.begin)
        if self.spread is None:
            yield self._at_home(partial(self.attention_side.attention, layer))
            return
        yield self._at_home(partial(self.spread.norm, layer))
        yield from self._meanwhile(layer, self.attends, partial(self.spread.part, layer))
        yield self._at_home(partial(self.spread.merge, layer))

    def _ffn_launches(self, layer: int) -> Iterator[Launch]:
        home, teams, hidden = self.home.team, self.route.ffns[layer], self.attention_side.hidden
        own = None
        if home in teams:
            assert self.ffn_at_home is not None
            output = hidden.outputs[teams.index(home)]
            own = partial(self.ffn_at_home.ffn, layer, hidden.normed, output)
        yield from self._meanwhile(layer, [self.ffns[team] for team in teams if team != home], own)

    def _meanwhile(
        self, layer: int, elsewhere: Sequence[Elsewhere], own: Callable[[], object] | None
    ) -> Iterator[Launch]:
        """The home computes its own part while the others compute theirs."""
        for other in elsewhere:
            yield Launch(self.home.team, other.crossing(layer).send)
        for other in elsewhere:
            yield from other.launches(layer)
        if own is not None:
            yield self._at_home(own)
        for other in elsewhere:
            yield Launch(self.home.team, other.back.receive)

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
    room = rooms[route.home]
    attention, spread = _attention_side(geometry, route, limits, phase, around, ring, room, sides)
    ports = {route.home: Port(route.home, tracks[route.home], attention.lane)}
    ffn_at_home, ffns, attends = None, {}, []
    for team in route.teams:
        room, track, begins = rooms[team], tracks[team], route.begins(team)
        if team not in ports:
            ports[team] = Port(team, track, room.take((LANE_WORDS,), torch.int64))
        home, port = ports[route.home], ports[team]
        if begins is not None:
            part, parts = route.part(team)
            side = sides.ffn(geometry, limits.queries, part, parts, track.device.chip, port.words, room)
            if port is home:
                ffn_at_home = side
            else:
                ffns[team] = ffn_elsewhere(home, port, attention.hidden, part, begins, side, room, sides)
        if spread is not None and team in route.others:
            pages, chip = around.others[team], track.device.chip
            own = sides.attention_elsewhere(geometry, limits, phase, pages, chip, port.words, room)
            attends.append(attention_elsewhere(home, port, spread, route.kv.index(team), own, sides))
    return LanePass(geometry, route, ports, attention, ffn_at_home, ffns, spread, attends, sides)


def _attention_side(
    geometry: Geometry,
    route: Route,
    limits: Limits,
    phase: Phase,
    around: HomeSurroundings,
    ring: Ring,
    room: Room,
    sides: Sides,
) -> tuple[AttentionSide, SpreadSide | None]:
    if not route.kv:
        return sides.attention(geometry, limits, phase, around, ring, room), None
    part, parts = route.kv.index(route.home), len(route.kv)
    spread = sides.spread_attention(geometry, limits, phase, around, ring, room, part, parts)
    return spread, spread
