"""A pass in a lane, half by half: what goes into which stream, and how hidden states cross between devices.

Home and weights devices that are the same have one stream, whose order is all that is needed. Otherwise a
half's input is copied to the device that computes it, and its output back, each after an event of the other
stream. (Peers that can store into each other's memory would rather do that, and set a flag: it belongs here.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from crosspool.backends.device import Event, Graph
from crosspool.core.batch import Phase
from crosspool.kernels.triton.words import LANE_WORDS, QUERIES, ROWS
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, Ring, Track
from crosspool.workers.cuda.room import Room
from crosspool.workers.cuda.sides import AttentionSide, FfnSide, Sides, SpreadSide
from crosspool.workers.cuda.spread import Other


@dataclass(frozen=True, slots=True)
class Remote:
    """The FFN side of a pass on a device that is not its home: the lane's ``words`` there, ``input`` and
    ``output`` [T, H], and what computes."""

    track: Track
    words: Tensor
    input: Tensor
    output: Tensor
    side: FfnSide


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

    def part(self, team: int) -> tuple[int, int]:
        """Which part of how many it makes of those FFNs that it has a part of."""
        layer = next(layer for layer in self.ffns if team in layer)
        return layer.index(team), len(layer)


@dataclass
class LanePass:
    """Passes of one geometry, within limits, in one lane. Once ``record``\\ ed, launches go as graphs.

    ``spread`` and ``others`` are the home and the other KV devices of contexts on several of them. Of these,
    the teams ``asked`` have pages of the grant that runs."""

    geometry: Geometry
    route: Route
    home: Track
    attention_side: AttentionSide
    ffn_at_home: FfnSide | None
    remotes: Mapping[int, Remote]
    words: Mapping[int, tuple[Track, Tensor]]
    spread: SpreadSide | None = None
    others: Sequence[Other] = ()
    asked: Collection[int] = ()
    _graphs: dict[object, Graph] = field(default_factory=dict)
    _told: set[int] = field(default_factory=set)

    def run(self) -> None:
        """All of a pass that has a head."""
        if ("pass",) in self._graphs:
            self.home.device.replay(self.home.stream, self._graphs["pass",])
            return
        for layer in range(self.geometry.num_layers):
            self.attention(layer)
            self.ffn(layer)
        self.head()

    def attention(self, layer: int) -> None:
        """The attention half of a layer; that of the first begins the pass."""
        if layer == 0:
            self._told.clear()
        if self.spread is not None:
            self._attention_spread(layer, self.spread)
            return
        self._launch(self.home, ("attention", layer), partial(self._attention, layer))

    def ffn(self, layer: int) -> None:
        """The FFN half of a layer, on all devices that have a part of it."""
        done: Event | None = None
        for part, team in enumerate(self.route.ffns[layer]):
            if team == self.route.home:
                self._launch(self.home, ("ffn", layer), partial(self._ffn, layer, part))
                continue
            if done is None:
                done = self.home.device.record(self.home.stream)
            self._ffn_elsewhere(layer, part, team, done)

    def head(self) -> None:
        self._launch(self.home, ("head",), self.attention_side.head)

    def end(self) -> None:
        """Of a pass without head."""
        self._launch(self.home, ("end",), self.attention_side.end)

    def record(self) -> None:
        """Record graphs: one of the whole pass if it stays at home, otherwise one of each half."""
        layers = range(self.geometry.num_layers)
        if self.route.at_home:
            self._record(self.home, ("pass",), self._everything)
            return
        for layer in layers:
            self._record_attention(layer)
            for part, team in enumerate(self.route.ffns[layer]):
                if team == self.route.home:
                    self._record(self.home, ("ffn", layer), partial(self._ffn, layer, part))
                    continue
                remote = self.remotes[team]
                launches = partial(remote.side.ffn, layer, remote.input, remote.output)
                self._record(remote.track, ("ffn", layer, team), launches)
        self._record(self.home, ("head",), self.attention_side.head)

    def _record_attention(self, layer: int) -> None:
        if self.spread is None:
            self._record(self.home, ("attention", layer), partial(self._attention, layer))
            return
        self._record(self.home, ("norm", layer), partial(self._norm, layer))
        for other in self.others:
            self._record(other.track, other.key(layer), other.launches(layer))
        self._record(self.home, ("part", layer), partial(self.spread.part, layer))
        self._record(self.home, ("merge", layer), partial(self.spread.merge, layer))

    def _attention_spread(self, layer: int, spread: SpreadSide) -> None:
        """An attention half on all KV devices that are asked; the states of others are nothing."""
        device, stream = self.home.device, self.home.stream
        self._launch(self.home, ("norm", layer), partial(self._norm, layer))
        normed = device.record(stream)
        done = []
        for other in self.others:
            if other.team in self.asked:
                done.append(other.attend(layer, spread, normed, self._launch))
            elif layer == 0:
                device.run(stream, spread.states.part(other.part).clear)
        self._launch(self.home, ("part", layer), partial(spread.part, layer))
        for event in done:
            device.wait(stream, event)
        self._launch(self.home, ("merge", layer), partial(spread.merge, layer))

    def _ffn_elsewhere(self, layer: int, part: int, team: int, done: Event) -> None:
        remote, hidden = self.remotes[team], self.attention_side.hidden
        device, stream = remote.track.device, remote.track.stream
        device.wait(stream, done)
        if team not in self._told:
            self._told.add(team)
            sizes = slice(ROWS, QUERIES + 1)
            device.copy(stream, remote.words[sizes], self.attention_side.lane[sizes])
        device.copy(stream, remote.input, hidden.normed)
        key = ("ffn", layer, team)
        self._launch(remote.track, key, partial(remote.side.ffn, layer, remote.input, remote.output))
        device.copy(stream, hidden.outputs[part], remote.output)
        self.home.device.wait(self.home.stream, device.record(stream))

    def _launch(self, track: Track, key: object, launches: Callable[[], object]) -> None:
        graph = self._graphs.get(key)
        if graph is None:
            track.device.run(track.stream, launches)
        else:
            track.device.replay(track.stream, graph)

    def _record(self, track: Track, key: object, launches: Callable[[], object]) -> None:
        self._graphs[key] = track.device.capture(track.stream, launches)

    def _attention(self, layer: int) -> None:
        if layer == 0:
            self.attention_side.begin()
        self.attention_side.attention(layer)

    def _norm(self, layer: int) -> None:
        assert self.spread is not None
        if layer == 0:
            self.spread.begin()
        self.spread.norm(layer)

    def _ffn(self, layer: int, part: int) -> None:
        hidden = self.attention_side.hidden
        assert self.ffn_at_home is not None
        self.ffn_at_home.ffn(layer, hidden.normed, hidden.outputs[part])

    def _everything(self) -> None:
        for layer in range(self.geometry.num_layers):
            self._attention(layer)
            self._ffn(layer, 0)
        self.attention_side.head()


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
    home, queries = route.home, limits.queries
    attention: AttentionSide
    spread, others = None, []
    if route.kv:
        place = route.kv.index(home), len(route.kv)
        attention = spread = sides.spread_attention(
            geometry, limits, phase, around, ring, rooms[home], *place
        )
    else:
        attention = sides.attention(geometry, limits, phase, around, ring, rooms[home])
    ffn_at_home, remotes, words = None, {}, {}
    for team in route.teams:
        room, chip = rooms[team], tracks[team].device.chip
        computes = any(team in layer for layer in route.ffns)
        if team == home:
            if computes:
                part = route.part(home)
                ffn_at_home = sides.ffn(geometry, queries, *part, chip, attention.lane, room)
            continue
        own = room.take((LANE_WORDS,), torch.int64)
        words[team] = tracks[team], own
        if computes:
            ins, out = (room.take((queries, geometry.hidden), geometry.dtype) for _ in range(2))
            side = sides.ffn(geometry, queries, *route.part(team), chip, own, room)
            remotes[team] = Remote(tracks[team], own, ins, out, side)
        if team in route.kv:
            elsewhere = sides.attention_elsewhere(
                geometry, limits, phase, around.others[team], chip, own, room
            )
            others.append(Other(team, route.kv.index(team), tracks[team], elsewhere))
    asked = route.others
    return LanePass(
        geometry, route, tracks[home], attention, ffn_at_home, remotes, words, spread, others, asked
    )
