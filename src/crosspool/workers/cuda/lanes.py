"""Lanes as the host sees them: what is in their streams, and the passes recorded over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from crosspool.backends.device import Event
from crosspool.core.batch import Phase
from crosspool.kernels.triton.grant_words import RECORD_SEQUENCE
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.flight import Flight
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import RING_RECORDS, Limits, Ring, Track
from crosspool.workers.cuda.lane_pass import LanePass, Route, make_pass
from crosspool.workers.cuda.model import DeviceModel
from crosspool.workers.cuda.room import Room
from crosspool.workers.cuda.sides import Sides

AHEAD = 2
"""Units that a lane's stream has before the host waits for the first of them to have run."""


class Unit(NamedTuple):
    """Work in a lane's stream, between two events. ``others`` are of the other devices that take part."""

    flight: Flight
    begin: Event
    end: Event
    others: tuple[Event, ...]


class Lane:
    """One lane. ``tracks`` are of the home's team and of all weights teams. Decodes of several grants may
    take turns in a lane, pass by pass; a prompt chunk has it to itself."""

    def __init__(
        self, phase: Phase, home: int, tracks: Mapping[int, Track], around: HomeSurroundings, sides: Sides
    ) -> None:
        self.phase = phase
        self.home = home
        self.bound: set[Flight] = set()
        self._tracks = tracks
        self._around = around
        self._sides = sides
        self._ring = Ring.on(tracks[home].device)
        self._read = 0
        self._passes: dict[tuple[Geometry, Route], list[tuple[Limits, LanePass]]] = {}
        self._units: deque[Unit] = deque()
        self._entered: Flight | None = None

    @property
    def track(self) -> Track:
        return self._tracks[self.home]

    @property
    def has_place(self) -> bool:
        return len(self._units) < AHEAD

    @property
    def may_bind(self) -> bool:
        return self.has_place and (self.phase is Phase.DECODE or not self.bound)

    def prepare(
        self,
        geometry: Geometry,
        route: Route,
        limits: Limits,
        enter: Callable[[LanePass], None],
        *,
        warm: bool,
    ) -> None:
        """Make what passes within these limits need, and record a decode's graphs, or launch a prompt's once,
        so that all code is compiled; before, ``enter`` leads the lane to a grant that computes nothing. The
        smallest limits of a geometry come first."""
        rooms = {team: Room(self._tracks[team].memory, self._tracks[team].zeros) for team in route.teams}
        made = make_pass(
            geometry,
            route,
            limits,
            self.phase,
            self._around,
            self._ring,
            self._tracks,
            rooms,
            self._sides,
        )
        self._passes.setdefault((geometry, route), []).append((limits, made))
        enter(made)
        if self.phase is Phase.DECODE:
            made.record()
        elif warm:
            made.run()

    def bind(self, flight: Flight) -> None:
        """The flight runs here from now on: its words go to the device."""
        self.bound.add(flight)
        flight.lane = self
        self.track.device.copy(self.track.stream, flight.packed.target, flight.packed.source)

    def put(self, flight: Flight) -> None:
        """Put the flight's next unit into the streams. If that fails, what is there already still counts."""
        device, stream = self.track.device, self.track.stream
        begin = device.record(stream)
        if flight.decoding or flight.lane_pass is None:
            flight.lane_pass = self._pass_for(flight)
        try:
            if self._entered is not flight:
                self._enter(flight)
            flight.launch()
        except BaseException:
            self._join()
            raise
        finally:
            flight.queued += 1
            self._units.append(Unit(flight, begin, device.record(stream), self._reached(flight)))

    def _reached(self, flight: Flight) -> tuple[Event, ...]:
        """Where the other devices of its way are now."""
        tracks = [self._tracks[team] for team in flight.route.teams if team != self.home]
        return tuple(track.device.record(track.stream) for track in tracks)

    def _join(self) -> None:
        """What comes into the home's stream waits for all others."""
        for team, track in self._tracks.items():
            if team != self.home:
                self.track.device.wait(self.track.stream, track.device.record(track.stream))

    def units_done(self) -> Iterator[Unit]:
        """Those that have run since the last call, in order. Raises DeviceError, also if a device has failed
        for which the first that has not run may wait."""
        while self._units and self._units[0].end.done():
            yield self._units.popleft()
        if self._units:
            for event in self._units[0].others:
                event.done()

    def release(self, flight: Flight) -> None:
        """Nothing of the flight is in the streams, nor will be."""
        self.bound.discard(flight)
        if self._entered is flight:
            self._entered = None

    def records(self) -> list[list[int]]:
        """What the device has written since the last call, in order.

        A lane has AHEAD units in its stream at most, so it never writes what has not been read.
        """
        written = int(self._ring.written.item())
        if written == self._read:
            return []
        fresh = []
        for sequence in range(self._read + 1, written + 1):
            words = self._ring.records[(sequence - 1) % RING_RECORDS].tolist()
            assert words[RECORD_SEQUENCE] == sequence
            fresh.append(words)
        self._read = written
        return fresh

    def enter(self, lane_pass: LanePass, grant: int, model: DeviceModel) -> None:
        """The lane runs the grant at this address from now on, with this model's weights."""
        sides, lane = self._sides, lane_pass.attention_side.lane
        self.track.device.run(self.track.stream, partial(sides.enter, lane, grant))
        for team, (track, words) in lane_pass.words.items():
            layers, *_, frequencies = model.lane_words(team)
            track.device.run(track.stream, partial(sides.lead, words, layers, frequencies))

    def _enter(self, flight: Flight) -> None:
        assert flight.lane_pass is not None
        self.enter(flight.lane_pass, flight.packed.address, flight.model)
        self._entered = flight

    def _pass_for(self, flight: Flight) -> LanePass:
        """The smallest that is large enough. A decode that has lost rows goes on in a smaller one: the device
        knows of whatever the host has heard from it, or told it."""
        rows, queries = flight.rows_left, flight.queries
        prepared = self._passes[flight.model.geometry, flight.route]
        return next(own for limits, own in prepared if limits.rows >= rows and limits.queries >= queries)
