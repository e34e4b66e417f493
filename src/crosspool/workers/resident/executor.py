"""core.protocols.Executor over resident teams: Python fills slots and reads events, nothing else."""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from crosspool.backends.base import Backend
from crosspool.core.batch import Event, Grant, RetiredEvent, Row, TokenEvent, row_after
from crosspool.core.copies import PageCopy
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds, RequestId, WeightsDevice
from crosspool.core.topology import Topology
from crosspool.workers.copier import HostCopier
from crosspool.workers.grant_rows import tokens_of
from crosspool.workers.resident import control as layout
from crosspool.workers.resident.attendance import note_place
from crosspool.workers.resident.body import Body, BodyMemory, body_bytes
from crosspool.workers.resident.control import SLOTS, TOKEN_EVENT, Control
from crosspool.workers.resident.crew import Crew, team_address
from crosspool.workers.resident.model import ResidentModel, largest
from crosspool.workers.resident.order import already_passed
from crosspool.workers.resident.protocol import (
    await_news,
    read_word,
    ring_bell,
    ring_news,
    submit,
    write_word,
)
from crosspool.workers.resident.run import run_leader, run_member, stage_addresses
from crosspool.workers.resident.spread import spread_context, teams_of
from crosspool.workers.resident.watch import Watch

_log = logging.getLogger(__name__)

MOST_TEAMS = 62
"""A slot has a word with a bit for each."""

PATIENCE = Nanoseconds(30_000_000_000)
"""No layer task takes so long."""

FAILED = "an internal error ended this request; the server's log says more"


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A grant in a slot. ``number_of`` are its rows by request."""

    grant: Grant
    body: Body
    number_of: Mapping[RequestId, int]
    dropped: set[RequestId]


class ResidentExecutor:
    """Teams of pinned threads run micro-batches in compiled code (loop.py) until the executor closes.

    ``backends`` are in the order of ``topology.teams``. ``arena`` is uint8 [pages, page_bytes], the pages of
    all KV devices as ``places`` says. ``most_tokens`` and ``most_rows`` bound every micro-batch: the scratch
    is for so many. With ``tasks`` the teams return to Python after so many layer tasks: what it costs is what
    lowering saves. A team that ends no task for ``patience`` is stuck. ``compiling`` is told how many of the
    compiled stages are there. ``copier`` is None where there is no spill store.
    """

    def __init__(
        self,
        topology: Topology,
        backends: Sequence[Backend],
        arena: Tensor,
        places: DevicePages,
        models: Mapping[ModelIndex, ResidentModel],
        *,
        most_tokens: int,
        most_rows: int,
        tasks: int | None = None,
        patience: Nanoseconds = PATIENCE,
        compiling: Callable[[int, int], None] = lambda done, total: None,
        copier: HostCopier | None = None,
    ) -> None:
        for model in models.values():
            model.check_complete()
        if len(backends) > MOST_TEAMS:
            raise InvariantError(f"{len(backends)} teams are more than {MOST_TEAMS}")
        self._models = models
        self._arena = arena
        self._places = places
        self._copier = copier
        self._most = (most_tokens, most_rows)
        self._teams = [int(topology.attention_team(device)) for device in places.devices]
        self._parts = topology.ffn_parts
        self._control = Control.allocate(len(backends))
        self._memory = BodyMemory()
        self._free_slots = list(range(SLOTS))
        self._sequence_of_slot = [0] * SLOTS
        self._sequence = 0
        self._flying: dict[int, _InFlight] = {}
        self._slots_of: dict[RequestId, set[int]] = {}
        self._seen_news = 0
        self._watch, self._patience = Watch(), patience
        self._piped = False
        self._broken: Exception | None = None
        self._closed = False
        stages = stage_addresses(compiling, spread=len(places.devices) > 1)
        self._crews = self._make_crews(topology, backends, stages)
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(crew, index, backend, tasks or 0),
                name=f"crosspool {backend.name} {index}",
                daemon=True,
            )
            for crew, backend in zip(self._crews, backends, strict=True)
            for index in range(crew.threads)
        ]
        for thread in self._threads:
            thread.start()
        if copier is not None:
            copier.start(self.wake)

    def _make_crews(self, topology: Topology, backends: Sequence[Backend], stages: np.ndarray) -> list[Crew]:
        addresses = np.zeros(max(self._models) + 1, np.int64)
        for index, model in self._models.items():
            addresses[index] = model.address
        weights_teams = [
            topology.weights_team(WeightsDevice(i)) for i in range(len(topology.weights_devices))
        ]
        scratch = largest(list(self._models.values()), *self._most)
        return [
            Crew(
                self._control,
                number,
                backend.threads,
                stages=stages,
                models=addresses,
                weights_teams=np.array(weights_teams, np.int64),
                sharding=topology.sharding,
                scratch=scratch,
            )
            for number, backend in enumerate(backends)
        ]

    # -- core.protocols.Executor ----------------------------------------------------------------------

    def submit(self, grant: Grant) -> None:
        """Raises InvariantError for a grant larger than the executor was made for."""
        if self._closed:
            raise InvariantError(f"grant {grant.id} was submitted to an executor that is closed")
        if tokens_of(grant) > self._most[0] or len(grant.rows) > self._most[1]:
            raise InvariantError(
                f"grant {grant.id} has {tokens_of(grant)} tokens in {len(grant.rows)} rows; "
                f"the scratch is for {self._most[0]} in {self._most[1]}"
            )
        model, arena = self._models[grant.model], self._arena
        spread = spread_context(grant, model, self._places, self._teams)
        memory = self._memory.take(body_bytes(grant, model, self._parts, spread))
        address, page_bytes = arena.data_ptr(), arena.shape[1]
        body = Body(grant, model, address, page_bytes, self._parts, spread, memory, piped=self._piped)
        slot = self._take_slot()
        number_of = {row.request: number for number, row in enumerate(grant.rows)}
        self._flying[slot] = _InFlight(grant, body, number_of, set())
        for request in number_of:
            self._slots_of.setdefault(request, set()).add(slot)
        self._fill(slot, grant, body)
        words = self._control.slot_words(slot)
        words[layout.SPREAD] = teams_of(grant, self._teams)
        words[layout.WIDTH] = 2 if spread is None else 2 * spread.rounds + 2
        self._sequence += 1
        self._sequence_of_slot[slot] = self._sequence
        team = team_address(self._control, self._teams[grant.kv_device])
        submit(self._slot_address(slot), self._sequence, team)

    def recall(self, grant: GrantId) -> None:
        for slot, flying in self._flying.items():
            if flying.grant.id == grant:
                self._control.slot_words(slot)[layout.RECALLED] = 1

    def copy(self, copy: PageCopy) -> None:
        """Raises InvariantError if there is no spill store."""
        if self._copier is None:
            raise InvariantError(f"copy {copy.id} of request {copy.request}, but there is no spill store")
        self._copier.copy(copy)

    def cancel(self, request: RequestId) -> None:
        if self._copier is not None:
            self._copier.cancel(request)
        for slot in self._slots_of.get(request, ()):
            flying = self._flying[slot]
            flying.dropped.add(request)
            flying.body.drop(flying.number_of[request])

    def stream_to(self, pipe: int) -> None:
        write_word(self._control.address + 8 * layout.TOKENS_TO, pipe)
        self._piped = True

    def poll(self) -> list[Event]:
        """Raises InvariantError if a team has died of a bug, or is stuck in a task: nothing can be relied on
        then."""
        if self._broken is not None:
            raise InvariantError("a worker thread has died") from self._broken
        self._look_at_teams()
        self._seen_news = read_word(self._control.address + 8 * layout.NEWS)
        events: list[Event] = [] if self._copier is None else [*self._copier.take()]
        for team in range(len(self._crews)):
            self._read_ring(team, events)
        return events

    def wait(self, timeout: float) -> None:
        if not self._closed and self._broken is None:
            self._seen_news = await_news(self._control.address, self._seen_news, int(timeout * 1e9))

    def wake(self) -> None:
        ring_news(self._control.address)

    def close(self) -> None:
        self._closed = True
        write_word(self._control.address + 8 * layout.STOP, 1)
        for team in range(len(self._crews)):
            ring_bell(team_address(self._control, team))
        ring_news(self._control.address)
        for thread in self._threads:
            thread.join()
        if self._copier is not None:
            self._copier.close()
        self._flying.clear()

    def _look_at_teams(self) -> None:
        teams = [team_address(self._control, team) for team in range(len(self._crews))]
        beats = [read_word(team + 8 * layout.BEATS) for team in teams]
        silence = self._watch.silence(beats, Nanoseconds(time.monotonic_ns()))
        if silence > self._patience:
            raise InvariantError(
                f"a team has ended no task for {silence / 1e9:.0f} s; "
                f"{len(self._flying)} grants are in flight"
            )

    # -- slots ----------------------------------------------------------------------------------------

    def _slot_address(self, slot: int) -> int:
        return self._control.slots + 8 * layout.SLOT_WORDS * slot

    def _take_slot(self) -> int:
        """The lowest slot that is free: teams look at all up to the highest ever used."""
        if not self._free_slots:
            raise InvariantError(f"more than {SLOTS} grants are in flight")
        slot = heapq.heappop(self._free_slots)
        while read_word(self._slot_address(slot) + 8 * layout.RETIRED) != self._sequence_of_slot[slot]:
            time.sleep(0)
        in_use = self._control.address + 8 * layout.SLOTS_IN_USE
        if slot >= read_word(in_use):
            write_word(in_use, slot + 1)
        return slot

    def _fill(self, slot: int, grant: Grant, body: Body) -> None:
        """The slot's words, but for its position."""
        words = self._control.slot_words(slot)
        words[layout.MODEL], words[layout.PHASE] = grant.model, grant.phase
        words[layout.TEAM], words[layout.INTERVAL] = self._teams[grant.kv_device], grant.interval
        words[layout.LAYER_COST], words[layout.STEPS] = grant.layer_cost, grant.steps
        words[layout.BODY] = body.address
        words[layout.HAS_HEAD] = any(row.choice is not None for row in grant.rows)
        words[[layout.RECALLED, layout.CHUNK_END, layout.ERROR]] = 0
        words[layout.ATTENTION_TIME : layout.FFN_TASKS + 1] = 0
        words[layout.START_BY] = grant.start_by
        in_use = read_word(self._control.address + 8 * layout.SLOTS_IN_USE)
        words[layout.PASSED] = already_passed(self._control.slots, in_use, int(grant.phase), grant.start_by)

    # -- events ---------------------------------------------------------------------------------------

    def _read_ring(self, team: int, events: list[Event]) -> None:
        address = team_address(self._control, team)
        written = read_word(address + 8 * layout.EVENTS_WRITTEN)
        read = int(self._control.team_words(team)[layout.EVENTS_READ])
        for kind, _, token, slot, row, made, delivered, _ in self._events(team, read, written):
            if kind == TOKEN_EVENT:
                self._take_token(self._flying[slot], row, token, made, bool(delivered), events)
            else:
                events.append(self._take_end(slot, row != 0, (Nanoseconds(token), Nanoseconds(made))))
        if written != read:
            write_word(address + 8 * layout.EVENTS_READ, written)

    def _events(self, team: int, read: int, written: int) -> list[list[int]]:
        """The words of a team's events from number ``read`` on."""
        ring, begin, end = self._control.ring(team), read % layout.RING_EVENTS, written % layout.RING_EVENTS
        if begin <= end and written - read < layout.RING_EVENTS:
            return ring[begin:end].tolist()  # type: ignore[no-any-return]
        return [*ring[begin:].tolist(), *ring[:end].tolist()]

    def _take_token(
        self, flying: _InFlight, number: int, token: int, made: int, delivered: bool, events: list[Event]
    ) -> None:
        row: Row = flying.grant.rows[number]
        if row.request in flying.dropped:
            return
        if delivered:
            events.append(TokenEvent(flying.grant.id, row.request, token, None, None, True))
            return
        finish, _ = row_after(row, made, token)
        asked = row.choice is not None and row.choice.params.logprobs is not None
        logprobs = flying.body.logprobs(number, made) if asked else None
        events.append(TokenEvent(flying.grant.id, row.request, token, finish, logprobs, delivered))

    def _take_end(self, slot: int, failed: bool, times: tuple[Nanoseconds, Nanoseconds]) -> RetiredEvent:
        flying = self._flying.pop(slot)
        for request in flying.number_of:
            slots = self._slots_of[request]
            slots.discard(slot)
            if not slots:
                del self._slots_of[request]
        self._memory.give_back(flying.body.memory)
        heapq.heappush(self._free_slots, slot)
        if failed:
            _log.error("a row of grant %d has logits of which none is the largest", flying.grant.id)
            return RetiredEvent(flying.grant.id, (Nanoseconds(0), Nanoseconds(0)), FAILED)
        return RetiredEvent(flying.grant.id, times)

    # -- threads --------------------------------------------------------------------------------------

    def _run(self, crew: Crew, index: int, backend: Backend, tasks: int) -> None:
        try:
            backend.bind_member(index)
            cores = frozenset(os.sched_getaffinity(0))
            note_place(crew.attendance, index, threading.get_native_id(), cores)
            (run_member if index else run_leader)(crew, index, tasks)
        except Exception as error:
            _log.exception("a worker thread of %s died", backend.name)
            self._broken = error
            ring_news(self._control.address)
