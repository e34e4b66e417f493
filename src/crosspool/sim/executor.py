"""An executor in virtual time: layer tasks take what the cost model predicts, tokens come from a function.

It runs the same state machine and the same order rule as the real executor.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from crosspool.core.batch import Event, Grant, Half, Phase, Piece, RetiredEvent, Row, TokenEvent, row_after
from crosspool.core.copies import PageCopy
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds, RequestId
from crosspool.core.in_flight import InFlight, LayerTask
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Team, Topology
from crosspool.costs.layer import HardwareProfile, LayerCosts
from crosspool.sim.clock import VirtualClock
from crosspool.sim.copier import VirtualCopier


class TokenModel(Protocol):
    """Stands for the model's arithmetic."""

    def begin_pass(self, grant: Grant, row: Row, start: int, tokens: tuple[int, ...]) -> None:
        """A row's inputs at positions ``start`` onwards enter the first layer."""
        ...

    def next_token(self, grant: Grant, row: Row, output_index: int) -> int:
        """The output token that the head chooses."""
        ...


@dataclass(slots=True)
class _Progress:
    """What one grant has made so far, and the times of its tasks by half."""

    grant: Grant
    made: dict[RequestId, list[int]] = field(default_factory=dict)
    time: list[int] = field(default_factory=lambda: [0, 0])
    tasks: list[int] = field(default_factory=lambda: [0, 0])

    def note(self, task: LayerTask, time: int) -> None:
        """Of an attention half in pieces, the time at home counts."""
        if task.piece is Piece.PART and task.part > 0:
            return
        self.time[task.half] += time
        self.tasks[task.half] += task.piece.begins


class SimExecutor:
    """Implements core.protocols.Executor. Time passes only in ``advance``.

    ``speed`` gives the factor by which a task's time differs from the prediction (1.0: exact). ``watch`` is
    called with (task, start, end) for every task begun.
    """

    def __init__(
        self,
        topology: Topology,
        specs: Mapping[ModelIndex, ModelSpec],
        clock: VirtualClock,
        tokens: TokenModel,
        profile: HardwareProfile,
        *,
        speed: Callable[[], float] = lambda: 1.0,
        watch: Callable[[LayerTask, int, int], None] | None = None,
    ) -> None:
        self._teams = [Team(index) for index in range(len(topology.teams))]
        self._costs = {model: LayerCosts(spec, profile) for model, spec in specs.items()}
        self._specs = dict(specs)
        self._clock = clock
        self._tokens = tokens
        self._speed = speed
        self._watch = watch
        self.in_flight = InFlight(topology, lambda model: specs[model].num_layers)
        self._copier = VirtualCopier(clock, lambda copy: int(profile.copy_time(copy.size) * speed()))
        self._progress: dict[int, _Progress] = {}
        self._ends: list[tuple[int, int, LayerTask]] = []
        self._busy: set[Team] = set()
        self._sequence = count()
        self._events: list[Event] = []

    def submit(self, grant: Grant) -> None:
        self.in_flight.submit(grant, self._clock.now())
        self._progress[grant.id] = _Progress(grant)
        self._begin_passes(grant)
        self._dispatch()

    def copy(self, copy: PageCopy) -> None:
        """Copies go on beside layer tasks, at the profile's bandwidth."""
        self._copier.begin(copy)

    def cancel(self, request: RequestId) -> None:
        self.in_flight.cancel(request)

    def recall(self, grant: GrantId) -> None:
        self.in_flight.recall(grant)

    def stream_to(self, pipe: int) -> None:
        """All tokens come as events."""

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def wait(self, timeout: float) -> None:
        """Let time pass until the next task or copy ends, but no longer than ``timeout`` seconds."""
        limit = self._clock.now() + int(timeout * 1e9)
        if not self._events and not self.advance(limit):
            self._clock.advance_to(limit)

    def wake(self) -> None:
        """Nobody waits in another thread."""

    def close(self) -> None:
        self._ends.clear()
        self._copier.close()

    @property
    def next_end(self) -> int | None:
        """When the next running task or copy ends."""
        ends = [self._ends[0][0]] if self._ends else []
        if self._copier.next_end is not None:
            ends.append(self._copier.next_end)
        return min(ends, default=None)

    def advance(self, limit: int | None = None) -> bool:
        """Let time pass to the next end of a task or copy, unless that is after ``limit``; returns whether it
        did."""
        end = self.next_end
        if end is None or (limit is not None and end > limit):
            return False
        self._clock.advance_to(end)
        if end == self._copier.next_end:
            self._end_copy()
            return True
        _, _, task = heapq.heappop(self._ends)
        self._busy.discard(task.team)
        self._end_task(task)
        self._dispatch()
        return True

    def _end_copy(self) -> PageCopy:
        copy, event = self._copier.end()
        self._events.append(event)
        return copy

    def _dispatch(self) -> None:
        for team in self._teams:
            if team not in self._busy:
                task = self.in_flight.start(team, self._clock.now())
                if task is not None:
                    self._begin_task(task)

    def _begin_task(self, task: LayerTask) -> None:
        now, progress = self._clock.now(), self._progress[task.grant]
        time = int(self._time(task, progress.grant) * self._speed())
        if task.layer < self._specs[progress.grant.model].num_layers:
            progress.note(task, time)
        self._busy.add(task.team)
        heapq.heappush(self._ends, (now + time, next(self._sequence), task))
        if self._watch is not None:
            self._watch(task, now, now + time)

    def _time(self, task: LayerTask, grant: Grant) -> int:
        costs = self._costs[grant.model]
        if task.layer == costs.spec.num_layers:
            return costs.head(sum(1 for row in grant.rows if row.choice is not None))
        if task.piece in (Piece.BEGIN, Piece.END):
            return costs.profile.task_overhead
        prefill = grant.phase is Phase.PREFILL
        work = costs.work((row.start + task.step, len(row.tokens) if prefill else 1) for row in grant.rows)
        return costs.half(task.half, work) // task.parts

    def _end_task(self, task: LayerTask) -> None:
        progress = self._progress[task.grant]
        grant = progress.grant
        ended: list[RequestId] = []
        if task.half is Half.ATTENTION and task.layer == self._specs[grant.model].num_layers:
            ended = self._choose(progress)
        retired = self.in_flight.finish(task, self._clock.now(), ended)
        if retired:
            del self._progress[task.grant]
            attention, ffn = (
                Nanoseconds(time // max(1, tasks))
                for time, tasks in zip(progress.time, progress.tasks, strict=True)
            )
            self._events.append(RetiredEvent(grant.id, (attention, ffn)))
        elif task.layer == self._specs[grant.model].num_layers:
            self._begin_passes(grant)

    def _choose(self, progress: _Progress) -> list[RequestId]:
        """The head: one token for each row that wants one. Returns the rows that leave the grant."""
        grant, ended = progress.grant, []
        for row in grant.rows:
            if row.choice is None or row.request not in self.in_flight[grant.id].alive:
                continue
            made = progress.made.setdefault(row.request, [])
            made.append(self._tokens.next_token(grant, row, row.choice.output_index + len(made)))
            finish, leaves = row_after(row, len(made), made[-1])
            self._events.append(TokenEvent(grant.id, row.request, made[-1], finish))
            if leaves:
                ended.append(row.request)
        return ended

    def _begin_passes(self, grant: Grant) -> None:
        progress = self._progress[grant.id]
        for row in grant.rows:
            if row.request not in self.in_flight[grant.id].alive:
                continue
            made = progress.made.get(row.request)
            if made:
                self._tokens.begin_pass(grant, row, row.start + len(made), (made[-1],))
            else:
                self._tokens.begin_pass(grant, row, row.start, row.tokens)
