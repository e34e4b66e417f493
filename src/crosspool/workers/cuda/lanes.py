"""Lanes as the host sees them: what is in their streams, and the passes recorded over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from crosspool.backends.device import Event
from crosspool.core.batch import Phase
from crosspool.core.errors import InvariantError
from crosspool.kernels.triton.grant_words import RECORD_SEQUENCE
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.crossing import Track
from crosspool.workers.cuda.flight import Flight
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import RING_RECORDS, Limits, Ring
from crosspool.workers.cuda.lane_pass import LanePass, Route, make_pass
from crosspool.workers.cuda.model import DeviceModel
from crosspool.workers.cuda.room import Room
from crosspool.workers.cuda.sides import Sides

AHEAD = 2
"""Units that a lane's stream has before the host waits for the first of them to have run."""

LOOP_PASSES = 16
"""Passes more that a loop may make at a time, if nobody else is in its lane: the fewer, the more often the
host has to think of it; the more, the longer it runs if the host is gone."""


class Unit(NamedTuple):
    """Work in a lane's stream, between two events."""

    flight: Flight
    begin: Event
    end: Event


class Lane:
    """One lane. ``tracks`` are of the home's team and of all weights teams. Decodes of several grants may
    take turns in a lane, pass by pass; a prompt chunk has it to itself. A loop ends when others come."""

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
        self._ring_passes = RING_RECORDS // (around.most_rows + 1)
        if self._ring_passes <= AHEAD:
            raise InvariantError(f"a ring of {RING_RECORDS} records is too small for {around.most_rows} rows")
        self._records, self._written = self._ring.records.numpy(), self._ring.written.numpy()
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

    def takes(self, flight: Flight) -> bool:
        """Whether it takes the flight's next unit now. A loop that is to become smaller ends first."""
        if not flight.looping:
            return self.has_place
        if sum(other.ahead for other in self.bound if not other.over) >= AHEAD:
            return False
        return flight.queued == 0 or self._pass_for(flight) is flight.lane_pass

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
        for other in self.bound:
            other.hold_back()
        self.bound.add(flight)
        flight.lane = self
        self.track.device.copy(self.track.stream, flight.packed.target, flight.packed.source)

    def put(self, flight: Flight) -> None:
        """Put the flight's next unit into the streams, or let the loop there make it. If that fails, what is
        there already still counts."""
        if flight.decoding or flight.lane_pass is None:
            flight.lane_pass = self._pass_for(flight)
        if flight.looping:
            flight.let(self._passes_at_once())
            if flight.queued > 0:
                return
        self._launch(flight)

    def row_left(self, flight: Flight) -> None:
        """A loop of more rows than there are now is to end, for a smaller one."""
        if flight.looping and flight.rows_left > 0 and self._pass_for(flight) is not flight.lane_pass:
            flight.hold_back()

    def _launch(self, flight: Flight) -> None:
        device, stream = self.track.device, self.track.stream
        begin = device.record(stream)
        try:
            if self._entered is not flight:
                self._enter(flight)
            flight.launch()
        except BaseException:
            self._join()
            raise
        finally:
            flight.queued += 1
            self._units.append(Unit(flight, begin, device.record(stream)))

    def _join(self) -> None:
        """What comes into the home's stream waits for all others."""
        for team, track in self._tracks.items():
            if team != self.home:
                self.track.device.follow(self.track.stream, track.stream)

    def units_done(self) -> Iterator[Unit]:
        """Those that have run since the last call, in order. Raises DeviceError, also if a device has failed
        for which the first that has not run may wait."""
        while self._units and self._units[0].end.done():
            yield self._units.popleft()
        for team in self._units[0].flight.route.teams if self._units else ():
            self._tracks[team].device.check()

    def release(self, flight: Flight) -> None:
        """Nothing of the flight is in the streams, nor will be."""
        self.bound.discard(flight)
        if self._entered is flight:
            self._entered = None

    def records(self) -> list[list[int]]:
        """What the device has written since the last call, in order.

        A lane has few units in its stream, or to make in a loop, so it never writes what has not been read.
        """
        written = int(self._written[0])
        if written == self._read:
            return []
        sequences = range(self._read + 1, written + 1)
        places = [(sequence - 1) % RING_RECORDS for sequence in sequences]
        fresh: list[list[int]] = self._records[places].tolist()
        assert [words[RECORD_SEQUENCE] for words in fresh] == list(sequences)
        self._read = written
        return fresh

    def enter(self, lane_pass: LanePass, grant: int, model: DeviceModel) -> None:
        """The lane runs the grant at this address from now on, with this model's weights. Before, its streams
        wait for each other, whatever became of the grant that was there."""
        home, sides = self.track, self._sides
        for port in lane_pass.others:
            device, stream = port.track.device, port.track.stream
            layers, *_, frequencies = model.lane_words(port.team)
            device.follow(stream, home.stream)
            device.run(stream, partial(sides.lead, port.words, layers, frequencies))
        lane_pass.settle(failed=False)
        home.device.run(home.stream, partial(sides.enter, lane_pass.home.words, grant))

    def _passes_at_once(self) -> int:
        """That a loop may make before the host looks again: their records have room in the ring."""
        return max(1, min(LOOP_PASSES, self._ring_passes - AHEAD)) if len(self.bound) == 1 else 1

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
