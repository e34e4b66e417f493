"""Feeds devices: puts units of work into lanes in the order of core/pick.py, a few ahead of what has run, and
turns what lanes write into their rings into events.

Without threads and locks: who has one of each calls ``step`` (executor.py), and so do tests, one step at a
time.

What fails while it is launched fails its micro-batch alone. A device that fails (DeviceError) takes with it
the grants whose home's streams it stops, and those that come; once no home is left, nothing can be relied on.
Where models have no homes of their own, whatever comes next may have pages on that device: then the grants of
other homes come to their ends, and nothing begins.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from crosspool.core.batch import Event, Grant, RetiredEvent, TokenEvent, row_after
from crosspool.core.errors import DeviceError, InvariantError
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.protocols import Clock
from crosspool.core.topology import Sharding, Topology
from crosspool.kernels.triton.grant_words import (
    FAILURE,
    RECORD_GRANT,
    RECORD_KIND,
    RECORD_MADE,
    RECORD_ROW,
    RECORD_TOKEN,
    SILENCE,
    TOKEN,
)
from crosspool.workers.cuda.flight import Flight
from crosspool.workers.cuda.grant import PackedGrant
from crosspool.workers.cuda.home import GrantLimits, Home
from crosspool.workers.cuda.lane_pass import Route
from crosspool.workers.cuda.model import DeviceModel
from crosspool.workers.cuda.order import next_unit, note_pass, note_unit, passed_at_begin
from crosspool.workers.cuda.pipe import TokenPipe
from crosspool.workers.grant_rows import tokens_of

_log = logging.getLogger(__name__)

NO_TIMES = (Nanoseconds(0), Nanoseconds(0))
FAILED = "an internal error ended this request; the server's log says more"


class Feeder:
    """``homes`` are in the order of the topology's KV devices. ``told``: there are events for which a wait
    ends. ``broken``: why nothing can be relied on any more."""

    def __init__(
        self,
        topology: Topology,
        homes: Sequence[Home],
        models: Mapping[ModelIndex, DeviceModel],
        limits: GrantLimits,
        clock: Clock,
    ) -> None:
        self._topology = topology
        self._homes = homes
        self._models = models
        self._limits = limits
        self._clock = clock
        self._flights: dict[GrantId, Flight] = {}
        self._events: list[Event] = []
        self._failed: set[int] = set()
        self._lost: DeviceError | None = None
        self._bound = topology.sharding is Sharding.MODEL
        self.pipe = TokenPipe()
        self.told = False
        self.broken: Exception | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, nor in a stream."""
        return not self._flights

    # -- the engine's side ------------------------------------------------------------------------------

    def submit(self, grant: Grant) -> None:
        """Raises InvariantError for a grant larger than the lanes, or one that cannot run where it is to."""
        self._check(grant)
        home, model = self._homes[grant.kv_device], self._models[grant.model]
        if home.team in self._failed or (self._failed and not self._bound):
            self._tell(RetiredEvent(grant.id, NO_TIMES, FAILED))
            return
        layout, words = model.geometry.layout, model.lane_words(home.team)
        others = [self._homes[device] for device in grant.elsewhere]
        packed = PackedGrant(grant, words, layout, home.memory, home.pages, [other.pages for other in others])
        layers = model.geometry.num_layers
        route = route_of(self._topology, grant.kv_device, layers, spread=bool(others))
        flight = Flight(grant, packed, model, route, grant.start_by)
        flight.passed = passed_at_begin(flight, self._flights.values())
        self._flights[grant.id] = flight

    def cancel(self, request: RequestId) -> None:
        for flight in self._flights.values():
            if any(row.request == request for row in flight.grant.rows):
                flight.dropped.add(request)
                flight.packed.drop(request)
                _row_left(flight)

    def recall(self, grant: GrantId) -> None:
        if grant in self._flights:
            self._flights[grant].recalled = True
            self._flights[grant].packed.recall()

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        self.told = False
        return events

    def _check(self, grant: Grant) -> None:
        most, rows, tokens = self._limits.most(grant.phase), len(grant.rows), tokens_of(grant)
        if rows > most.rows or tokens > most.queries:
            raise InvariantError(
                f"grant {grant.id} has {tokens} tokens in {rows} rows; "
                f"lanes are for {most.queries} in {most.rows}"
            )
        homes = self._models[grant.model].homes
        for device in (grant.kv_device, *grant.elsewhere):
            if device >= len(self._homes) or self._homes[device].team not in homes:
                raise InvariantError(
                    f"grant {grant.id}: KV device {device} has no attention side of model {grant.model}"
                )

    # -- the devices' side ------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take what has run, and put in what comes next. Returns whether there was anything to do."""
        busy = False
        for home in self._homes:
            if home.team in self._failed:
                continue
            try:
                busy |= self._take(home)
                busy |= self._feed(home)
            except DeviceError as error:
                self._fail(home, error)
                busy = True
        if self._lost is not None and not self._bound and self.idle:
            self.broken, self.told = self._lost, True
        return busy

    def _feed(self, home: Home) -> bool:
        """Put units into the home's lanes until they have enough, or the order rule wants to wait."""
        fed, here = False, self._at(home)
        while (flight := next_unit(here, home.lanes, self._clock.now())) is not None:
            note_unit(flight, here, self._clock.now())
            assert flight.lane is not None
            try:
                flight.lane.put(flight)
            except DeviceError:
                raise
            except Exception:
                _log.exception("a pass of model %d could not be launched", flight.grant.model)
                flight.error = FAILED
                flight.hold_back()
            fed = True
        return fed

    def _take(self, home: Home) -> bool:
        """What of the home's lanes has run, and what they have told: in this order, so that nothing is missed
        of what has run."""
        taken = False
        for lane in home.lanes:
            for unit in lane.units_done():
                unit.flight.queued -= 1
                unit.flight.spans.append(unit.end.since(unit.begin))
                taken = True
            for record in lane.records():
                self._take_record(record)
                taken = True
        for flight in self._at(home):
            flight.settle()
            if flight.ended and not flight.retired:
                self._retire(flight)
                taken = True
            if flight.retired and flight.queued == 0:
                self._forget(flight, home)
        return taken

    def _take_record(self, record: list[int]) -> None:
        flight = self._flights[GrantId(record[RECORD_GRANT])]
        if record[RECORD_KIND] == TOKEN:
            self._take_token(flight, record[RECORD_ROW], record[RECORD_TOKEN], record[RECORD_MADE])
            return
        flight.over = True
        if record[RECORD_KIND] == FAILURE:
            _log.error("a row of grant %d has logits of which none is the largest", flight.grant.id)
            flight.error = FAILED
        if record[RECORD_KIND] == SILENCE:
            _log.error("grant %d waited in vain for another device to answer", flight.grant.id)
            flight.error = FAILED

    def _take_token(self, flight: Flight, number: int, token: int, made: int) -> None:
        row = flight.grant.rows[number]
        if made > flight.made:
            flight.made = made
            if flight.looping and flight.ahead > 0:
                note_pass(flight, self._flights_at(flight.route.home), self._clock.now())
        if row.request in flight.dropped:
            return
        assert row.choice is not None
        finish, leaves = row_after(row, made, token)
        if leaves:
            flight.gone.add(row.request)
            _row_left(flight)
        asked = row.choice.params.logprobs is not None
        logprobs = flight.packed.logprobs(number, made) if asked else None
        delivered = False
        if finish is None and not asked and row.request not in flight.undelivered:
            delivered = self.pipe.take(row.request, token)
        if not delivered:
            # None overtakes another: whatever comes after it goes the same way.
            flight.undelivered.add(row.request)
        event = TokenEvent(flight.grant.id, row.request, token, finish, logprobs, delivered)
        self._tell(event, ends_wait=not delivered)

    def _retire(self, flight: Flight) -> None:
        flight.retired = True
        times = NO_TIMES if flight.error is not None else flight.layer_times
        self._tell(RetiredEvent(flight.grant.id, times, flight.error))

    def _forget(self, flight: Flight, home: Home) -> None:
        """Nothing of it is in a stream any more: its words may be another grant's."""
        if flight.lane is not None:
            flight.lane.release(flight)
        home.memory.give_back(flight.packed.span)
        del self._flights[flight.grant.id]

    def _tell(self, event: Event, *, ends_wait: bool = True) -> None:
        self._events.append(event)
        self.told |= ends_wait

    def _at(self, home: Home) -> list[Flight]:
        return self._flights_at(home.team)

    def _flights_at(self, team: int) -> list[Flight]:
        return [flight for flight in self._flights.values() if flight.route.home == team]

    def _fail(self, home: Home, error: DeviceError) -> None:
        """Something on the way of this home's grants has failed: they end, and so does whatever comes."""
        self._lost = error
        _log.error("nothing runs any more that is at home on KV device %d: %s", home.team, error)
        self._failed.add(home.team)
        for flight in self._at(home):
            flight.error = FAILED
            if not flight.retired:
                self._retire(flight)
            del self._flights[flight.grant.id]
        if len(self._failed) == len(self._homes):
            self.broken = error
            self.told = True


def _row_left(flight: Flight) -> None:
    if flight.lane is not None:
        flight.lane.row_left(flight)


def route_of(topology: Topology, home: KvDevice, num_layers: int, *, spread: bool = False) -> Route:
    """Where the halves of a model's layers are, of a micro-batch with this home whose contexts are there, or
    ``spread`` over several KV devices."""
    kv = topology.attention_devices(home) if spread else ()
    return Route(
        int(topology.attention_team(home)),
        tuple(
            tuple(int(topology.weights_team(device)) for device in topology.ffn_devices(layer, home))
            for layer in range(num_layers)
        ),
        tuple(int(topology.attention_team(device)) for device in kv),
    )


def routes_of(topology: Topology, home: KvDevice, num_layers: int) -> tuple[Route, ...]:
    """All that such a micro-batch may take."""
    alone = route_of(topology, home, num_layers)
    if len(topology.attention_devices(home)) == 1:
        return (alone,)
    return alone, route_of(topology, home, num_layers, spread=True)
