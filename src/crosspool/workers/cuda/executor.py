"""core.protocols.Executor over devices with streams.

The engine's thread lays grants out and reads events. One more thread feeds the devices: it puts units of work
into lanes in the order of core/pick.py, a few ahead of what has run, and reads what the lanes write into
their rings. Tokens, stop checks and next inputs need no host: see kernels/triton/pass_end.py.

What fails while it is launched fails its micro-batch alone. A device that fails (DeviceError) takes with it
the grants that ran on it, and those that come; once no home is left, nothing can be relied on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from crosspool.backends.device import Device
from crosspool.core.batch import Event, Grant, RetiredEvent, TokenEvent, row_after
from crosspool.core.errors import DeviceError, InvariantError
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.protocols import Clock
from crosspool.core.topology import Topology
from crosspool.kernels.triton.grant_words import (
    FAILURE,
    RECORD_GRANT,
    RECORD_KIND,
    RECORD_MADE,
    RECORD_ROW,
    RECORD_TOKEN,
    TOKEN,
)
from crosspool.workers.cuda.flight import Flight
from crosspool.workers.cuda.grant import PackedGrant
from crosspool.workers.cuda.home import GrantLimits, Home
from crosspool.workers.cuda.lane_pass import Route
from crosspool.workers.cuda.model import DeviceModel
from crosspool.workers.cuda.order import already_passed, next_unit, note_unit
from crosspool.workers.cuda.pipe import TokenPipe
from crosspool.workers.grant_rows import tokens_of

_log = logging.getLogger(__name__)

NO_TIMES = (Nanoseconds(0), Nanoseconds(0))
FAILED = "an internal error ended this request; the server's log says more"

PAUSE = 20e-6
"""Seconds between two looks at what has run."""


class CudaExecutor:
    """``devices`` and ``homes`` are in the order of the topology's teams and KV devices. Everything that
    serving needs has been allocated: the devices are sealed."""

    def __init__(
        self,
        topology: Topology,
        devices: Sequence[Device],
        homes: Sequence[Home],
        models: Mapping[ModelIndex, DeviceModel],
        limits: GrantLimits,
        clock: Clock,
        *,
        pause: float = PAUSE,
    ) -> None:
        self._topology = topology
        self._devices = devices
        self._homes = homes
        self._models = models
        self._limits = limits
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._news, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._flights: dict[GrantId, Flight] = {}
        self._events: list[Event] = []
        self._pipe = TokenPipe()
        self._failed: set[int] = set()
        self._broken: Exception | None = None
        self._woken = self._told = self._closed = False
        for device in devices:
            device.seal()
        self._thread = threading.Thread(target=self._run, name="crosspool devices", daemon=True)
        self._thread.start()

    # -- core.protocols.Executor ----------------------------------------------------------------------

    def submit(self, grant: Grant) -> None:
        """Raises InvariantError for a grant larger than the lanes, or one that cannot run where it is to."""
        with self._lock:
            if self._closed:
                raise InvariantError(f"grant {grant.id} was submitted to an executor that is closed")
            self._check(grant)
            home, model = self._homes[grant.kv_device], self._models[grant.model]
            if home.team in self._failed:
                self._tell(RetiredEvent(grant.id, NO_TIMES, FAILED))
                return
            layout, words = model.geometry.layout, model.lane_words(home.team)
            packed = PackedGrant(grant, words, layout, home.memory, home.first_page)
            route = route_of(self._topology, grant.kv_device, model.geometry.num_layers)
            flight = Flight(grant, packed, model, route, grant.start_by)
            flight.passed = already_passed(flight, self._flights.values(), self._clock.now())
            self._flights[grant.id] = flight
            self._work.notify()

    def cancel(self, request: RequestId) -> None:
        with self._lock:
            for flight in self._flights.values():
                if any(row.request == request for row in flight.grant.rows):
                    flight.dropped.add(request)
                    flight.packed.drop(request)
            self._work.notify()

    def recall(self, grant: GrantId) -> None:
        with self._lock:
            if grant in self._flights:
                self._flights[grant].recalled = True
                self._flights[grant].packed.recall()

    def stream_to(self, pipe: int) -> None:
        self._pipe.to = pipe

    def poll(self) -> list[Event]:
        """Raises InvariantError if nothing can be relied on any more."""
        with self._lock:
            if self._broken is not None:
                raise InvariantError("the devices are no longer fed") from self._broken
            events, self._events = self._events, []
            self._told = False
            return events

    def wait(self, timeout: float) -> None:
        with self._lock:
            self._news.wait_for(self._has_news, timeout)
            self._woken = False

    def wake(self) -> None:
        with self._lock:
            self._woken = True
            self._news.notify_all()

    def close(self) -> None:
        """Raises InvariantError if something was allocated on a device while it served."""
        with self._lock:
            self._closed = True
            self._work.notify()
            self._news.notify_all()
        self._thread.join()
        self._flights.clear()
        for team, device in enumerate(self._devices):
            if team not in self._failed:
                device.finish()
                device.check_sealed()

    def _has_news(self) -> bool:
        return self._told or self._woken or self._closed or self._broken is not None

    def _check(self, grant: Grant) -> None:
        most, rows, tokens = self._limits.most(grant.phase), len(grant.rows), tokens_of(grant)
        if rows > most.rows or tokens > most.queries:
            raise InvariantError(
                f"grant {grant.id} has {tokens} tokens in {rows} rows; "
                f"lanes are for {most.queries} in {most.rows}"
            )
        home = self._topology.attention_team(grant.kv_device)
        if grant.elsewhere or self._models[grant.model].home != home:
            raise InvariantError(
                f"grant {grant.id}: model {grant.model} and all pages of its rows must be on its home, "
                f"KV device {grant.kv_device}"
            )

    # -- the thread that feeds the devices --------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                if not self.step():
                    time.sleep(self._pause)
        except Exception as error:
            _log.exception("the thread that feeds the devices died")
            with self._lock:
                self._broken = error
                self._news.notify_all()

    def _await_work(self) -> bool:
        """Block while nothing is in flight. False once the executor is closed."""
        with self._lock:
            self._work.wait_for(lambda: self._closed or self._flights)
            return not self._closed

    def step(self) -> bool:
        """Take what has run, and put in what comes next. Returns whether there was anything to do."""
        with self._lock:
            busy = False
            for home in self._homes:
                if home.team in self._failed:
                    continue
                try:
                    busy |= self._take(home)
                    busy |= self._feed(home)
                except DeviceError as error:
                    self._fail(home.team, error)
                    busy = True
            return busy

    def _feed(self, home: Home) -> bool:
        """Put units into the home's lanes until they have enough, or the order rule wants to wait."""
        fed = False
        here = [flight for flight in self._flights.values() if self._at(flight, home)]
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
            fed = True
        return fed

    def _take(self, home: Home) -> bool:
        """What of the home's lanes has run, and what it has told."""
        taken = False
        for lane in home.lanes:
            for unit in lane.units_done():
                unit.flight.queued -= 1
                unit.flight.spans.append(unit.end.since(unit.begin))
                taken = True
            for record in lane.records():
                self._take_record(record)
                taken = True
        for flight in [flight for flight in self._flights.values() if self._at(flight, home)]:
            taken |= self._look_after(flight, home)
        return taken

    def _look_after(self, flight: Flight, home: Home) -> bool:
        """Retire a flight that has ended, and forget it once nothing of it is in a stream."""
        if flight.ended and not flight.retired:
            self._retire(flight, flight.error)
        if not flight.retired or flight.queued:
            return False
        if flight.lane is not None:
            flight.lane.release(flight)
        home.memory.give_back(flight.packed.span)
        del self._flights[flight.grant.id]
        return True

    def _take_record(self, record: list[int]) -> None:
        flight = self._flights[GrantId(record[RECORD_GRANT])]
        if record[RECORD_KIND] == TOKEN:
            self._take_token(flight, record[RECORD_ROW], record[RECORD_TOKEN], record[RECORD_MADE])
            return
        flight.over = True
        if record[RECORD_KIND] == FAILURE:
            _log.error("a row of grant %d has logits of which none is the largest", flight.grant.id)
            flight.error = FAILED

    def _take_token(self, flight: Flight, number: int, token: int, made: int) -> None:
        row = flight.grant.rows[number]
        flight.made = max(flight.made, made)
        if row.request in flight.dropped:
            return
        assert row.choice is not None
        finish, _ = row_after(row, made, token)
        asked = row.choice.params.logprobs is not None
        logprobs = flight.packed.logprobs(number, made) if asked else None
        delivered = False
        if finish is None and not asked and row.request not in flight.undelivered:
            delivered = self._pipe.take(row.request, token)
        if not delivered:
            # None overtakes another: whatever comes after it goes the same way.
            flight.undelivered.add(row.request)
        event = TokenEvent(flight.grant.id, row.request, token, finish, logprobs, delivered)
        self._tell(event, ends_wait=not delivered)

    def _retire(self, flight: Flight, error: str | None) -> None:
        flight.retired = True
        times = NO_TIMES if error is not None else flight.layer_times
        self._tell(RetiredEvent(flight.grant.id, times, error))

    def _tell(self, event: Event, *, ends_wait: bool = True) -> None:
        self._events.append(event)
        if ends_wait:
            self._told = True
            self._news.notify_all()

    def _at(self, flight: Flight, home: Home) -> bool:
        return flight.route.home == home.team

    def _fail(self, team: int, error: DeviceError) -> None:
        """Something on the way of this home's grants has failed: they end, and so does whatever comes."""
        _log.error("device %s has failed: %s", self._devices[team].name, error)
        self._failed.add(team)
        for flight in list(self._flights.values()):
            if flight.route.home == team:
                if not flight.retired:
                    self._retire(flight, FAILED)
                del self._flights[flight.grant.id]
        if self._failed >= {home.team for home in self._homes}:
            self._broken = error
            self._news.notify_all()


def route_of(topology: Topology, home: KvDevice, num_layers: int) -> Route:
    """Where the halves of a model's layers are, of a micro-batch with this home."""
    return Route(
        int(topology.attention_team(home)),
        tuple(
            tuple(int(topology.weights_team(device)) for device in topology.ffn_devices(layer, home))
            for layer in range(num_layers)
        ),
    )
