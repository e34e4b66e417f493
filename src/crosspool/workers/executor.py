"""Runs micro-batches layer by layer on teams of threads, in the order of core/pick.py."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import torch

from crosspool.backends.base import Backend
from crosspool.core.batch import Event, Grant, Half, RetiredEvent, TokenEvent
from crosspool.core.copies import PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds, RequestId
from crosspool.core.in_flight import InFlight, LayerTask
from crosspool.core.protocols import Clock
from crosspool.core.topology import Team, Topology
from crosspool.workers.attention import AttentionWorker
from crosspool.workers.copier import HostCopier
from crosspool.workers.ffn import FfnWorker
from crosspool.workers.grant_state import GrantState

_log = logging.getLogger(__name__)

Chosen = Sequence[tuple[TokenEvent, bool]]
"""Tokens of one pass, and for each whether it was its row's last."""

FAILED = "an internal error ended this request; the server's log says more"


class ThreadedExecutor:
    """core.protocols.Executor with one thread per team.

    All teams share one state of what is in flight, under one lock. Whoever changes it hands the tasks that
    can now run to the teams that are idle, so a team wakes only for a task and an idle executor costs
    nothing. ``backends`` are in the order of ``topology.teams``, ``attention`` in that of its KV devices,
    ``ffn`` in that of its weights devices; ``layers`` says how many each model has. ``copier`` is None where
    there is no spill store.
    """

    def __init__(
        self,
        topology: Topology,
        backends: Sequence[Backend],
        attention: Sequence[AttentionWorker],
        ffn: Sequence[FfnWorker],
        layers: Mapping[ModelIndex, int],
        clock: Clock,
        copier: HostCopier | None = None,
    ) -> None:
        self._topology = topology
        self._attention = attention
        self._ffn = ffn
        self._layers = layers
        self._clock = clock
        self._copier = copier
        self._lock = threading.Lock()
        self._in_flight = InFlight(topology, layers.__getitem__)
        self._states: dict[GrantId, GrantState] = {}
        self._idle: set[Team] = set()
        self._handed: dict[Team, LayerTask] = {}
        self._handed_to = [threading.Condition(self._lock) for _ in backends]
        self._events: list[Event] = []
        self._news = threading.Condition(self._lock)
        self._woken = False
        self._closed = False
        self._broken: Exception | None = None
        self._threads = [
            threading.Thread(
                target=self._run_team,
                args=(Team(team), backend),
                name=f"crosspool {backend.name}",
                daemon=True,
            )
            for team, backend in enumerate(backends)
        ]
        for thread in self._threads:
            thread.start()
        if copier is not None:
            copier.start(self.wake)

    # -- core.protocols.Executor ----------------------------------------------------------------------

    def submit(self, grant: Grant) -> None:
        with self._lock:
            if self._closed:
                raise InvariantError(f"grant {grant.id} was submitted to an executor that is closed")
            self._in_flight.submit(grant, self._clock.now())
            self._states[grant.id] = GrantState(grant, self._in_flight[grant.id].alive)
            self._hand_out()

    def copy(self, copy: PageCopy) -> None:
        """Raises InvariantError if there is no spill store."""
        if self._copier is None:
            raise InvariantError(f"copy {copy.id} of request {copy.request}, but there is no spill store")
        self._copier.copy(copy)

    def cancel(self, request: RequestId) -> None:
        if self._copier is not None:
            self._copier.cancel(request)
        with self._lock:
            self._in_flight.cancel(request)

    def recall(self, grant: GrantId) -> None:
        with self._lock:
            self._in_flight.recall(grant)

    def stream_to(self, pipe: int) -> None:
        """All tokens come as events."""

    def poll(self) -> list[Event]:
        """Raises InvariantError if a team has died of a bug: nothing can be relied on then."""
        with self._lock:
            if self._broken is not None:
                raise InvariantError("a worker thread has died") from self._broken
            events, self._events = self._events, []
        if self._copier is not None:
            events += self._copier.take()
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
        with self._lock:
            self._closed = True
            self._news.notify_all()
            for handed_to in self._handed_to:
                handed_to.notify()
        for thread in self._threads:
            thread.join()
        if self._copier is not None:
            self._copier.close()
        self._states.clear()

    def _has_news(self) -> bool:
        return bool(self._events) or self._woken or self._closed or self._broken is not None

    # -- teams ----------------------------------------------------------------------------------------

    def _run_team(self, team: Team, backend: Backend) -> None:
        try:
            backend.bind_thread()
            with torch.inference_mode():
                task = self._next(team)
                while task is not None:
                    self._run(task)
                    task = self._next(team)
        except Exception as error:
            _log.exception("the worker thread of %s died", backend.name)
            with self._lock:
                self._broken = error
                self._news.notify_all()

    def _next(self, team: Team) -> LayerTask | None:
        """Block until this team has a task; None when the executor closes."""
        with self._lock:
            self._idle.add(team)
            self._hand_out()
            while team not in self._handed:
                if self._closed:
                    return None
                self._handed_to[team].wait()
            return self._handed.pop(team)

    def _hand_out(self) -> None:
        """Give every idle team the task that it may run now, if there is one."""
        if self._closed:
            return
        now = self._clock.now()
        for team in sorted(self._idle):
            task = self._in_flight.start(team, now)
            if task is not None:
                self._idle.remove(team)
                self._handed[team] = task
                self._handed_to[team].notify()

    def _run(self, task: LayerTask) -> None:
        """Run one task; if it fails, its micro-batch fails alone."""
        state = self._states[task.grant]
        begin = self._clock.now()
        chosen: Chosen = ()
        failed = False
        try:
            chosen = self._compute(task, state)
        except Exception:
            failed = True
            _log.exception("%s of layer %d of model %d failed", task.half.name, task.layer, state.grant.model)
        end = self._clock.now()
        with self._lock:
            if task.layer < self._layers[state.grant.model] and task.piece.ends:
                state.times[task.half].add(end - begin)
            if failed:
                state.error = FAILED
                retired = self._in_flight.fail(task, end)
            else:
                retired = self._in_flight.finish(task, end, self._put_out(chosen, state))
            if retired:
                self._retire(state)

    def _compute(self, task: LayerTask, state: GrantState) -> Chosen:
        grant = state.grant
        if task.half is Half.FFN:
            device = self._topology.ffn_devices(task.layer, grant.kv_device)[task.part]
            hidden = state.channel.receive_input()
            state.channel.send_output(task.part, self._ffn[device].ffn(grant.model, task.layer, hidden))
            return ()
        worker = self._attention[grant.kv_device]
        if task.layer == self._layers[grant.model]:
            return worker.head(state)
        if task.piece.ends:
            # One arena has the pages of all devices: the home computes a half that is in pieces by itself.
            worker.attention(state, task.layer)
        return ()

    def _put_out(self, chosen: Chosen, state: GrantState) -> list[RequestId]:
        """Queue the tokens of rows that were not cancelled meanwhile. Returns the rows that end."""
        tokens = [(event, ended) for event, ended in chosen if event.request in state.alive]
        if tokens:
            self._events.extend(event for event, _ in tokens)
            self._news.notify_all()
        return [event.request for event, ended in tokens if ended]

    def _retire(self, state: GrantState) -> None:
        del self._states[state.grant.id]
        times = (state.times[Half.ATTENTION].mean, state.times[Half.FFN].mean)
        if state.error is not None:
            times = (Nanoseconds(0), Nanoseconds(0))
        self._events.append(RetiredEvent(state.grant.id, times, state.error))
        self._news.notify_all()
