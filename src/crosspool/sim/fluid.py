"""An executor in virtual time for long traces: every sequence has its own fixed speed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from crosspool.core.batch import Event, Grant, Phase, RetiredEvent, Row, TokenEvent
from crosspool.core.config import SECOND
from crosspool.core.copies import PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason
from crosspool.core.spec import ModelSpec
from crosspool.sim.clock import VirtualClock
from crosspool.sim.copier import VirtualCopier

TOKEN = 0
"""Every token that is made. What a trace knows of an output is its length."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens of one prompt read in a second, the time between two tokens of one sequence in ns, and bytes
    copied in a second between KV pages and host memory."""

    prefill_tokens_per_second: float = 8000.0
    tbt: Nanoseconds = Nanoseconds(SECOND // 25)
    copy_bytes_per_second: float = 10e9


@dataclass(slots=True)
class Progress:
    """One grant in flight. ``made`` is how many tokens each row makes if the grant runs to its end."""

    grant: Grant
    begin: int
    end: int
    made: list[int]
    cancelled: set[RequestId] = field(default_factory=set)


class FluidExecutor:
    """Implements core.protocols.Executor. Time passes only in ``advance``.

    A prefill takes what its longest row takes, a decode ``tbt`` for each step. All tokens of a grant come
    when it retires: while it is in flight nothing follows from them but that a recall ends it, and that is at
    a step boundary as in every executor. ``output_tokens`` gives the true length of a request's output.
    ``watch`` is called with the progress of every grant that retires, and how many tokens each row made.
    """

    def __init__(
        self,
        specs: Mapping[ModelIndex, ModelSpec],
        clock: VirtualClock,
        output_tokens: Callable[[RequestId], int],
        rates: Rates,
        watch: Callable[[Progress, list[int]], None],
    ) -> None:
        self._layers = {model: spec.num_layers for model, spec in specs.items()}
        self._clock = clock
        self._output_tokens = output_tokens
        self._rates = rates
        self._watch = watch
        self._copier = VirtualCopier(clock, self._copy_time)
        self._in_flight: dict[GrantId, Progress] = {}
        self._ends: list[tuple[int, int, GrantId]] = []
        self._order = count()
        self._events: list[Event] = []

    def submit(self, grant: Grant) -> None:
        now, tbt = self._clock.now(), self._rates.tbt
        if grant.phase is Phase.DECODE:
            made = [min(row.steps, self._left(row)) for row in grant.rows]
            time = max(made) * tbt
        else:
            made = [0 if row.choice is None else 1 for row in grant.rows]
            longest = max(len(row.tokens) for row in grant.rows)
            time = round(longest / self._rates.prefill_tokens_per_second * SECOND)
        progress = Progress(grant, now, now + time, made)
        self._in_flight[grant.id] = progress
        self._ends_at(progress)

    def copy(self, copy: PageCopy) -> None:
        """Copies go on beside grants."""
        self._copier.begin(copy)

    def _copy_time(self, copy: PageCopy) -> int:
        return round(copy.size / self._rates.copy_bytes_per_second * SECOND)

    def cancel(self, request: RequestId) -> None:
        for progress in list(self._in_flight.values()):
            progress.cancelled.add(request)
            if progress.cancelled.issuperset(row.request for row in progress.grant.rows):
                self.recall(progress.grant.id)

    def recall(self, grant: GrantId) -> None:
        progress = self._in_flight.get(grant)
        if progress is None or progress.grant.phase is not Phase.DECODE:
            return
        end = progress.begin + max(1, self._steps_until(progress, self._clock.now())) * self._rates.tbt
        if end < progress.end:
            progress.end = end
            self._ends_at(progress)

    def stream_to(self, pipe: int) -> None:
        """All tokens come as events."""

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def wait(self, timeout: float) -> None:
        """Let time pass to the next end, but no longer than ``timeout`` seconds."""
        limit = self._clock.now() + int(timeout * SECOND)
        end = self.next_end
        self.advance_to(limit if end is None else min(end, limit))

    def wake(self) -> None:
        """Nobody waits in another thread."""

    def close(self) -> None:
        self._in_flight.clear()
        self._copier.close()

    def computed(self, time: int) -> dict[RequestId, int]:
        """Tokens of every row in flight whose KV is in pages at ``time``, which is not after the next end."""
        return {
            row.request: row.start + self._row_progress(progress, index, time)
            for progress in self._in_flight.values()
            for index, row in enumerate(progress.grant.rows)
        }

    @property
    def next_end(self) -> int | None:
        """When the next grant retires, or the next copy is over."""
        ends = (self._next_retirement(), self._copier.next_end)
        return min((end for end in ends if end is not None), default=None)

    def _next_retirement(self) -> int | None:
        while self._ends:
            end, _, grant = self._ends[0]
            progress = self._in_flight.get(grant)
            if progress is not None and progress.end == end:
                return end
            heapq.heappop(self._ends)
        return None

    def advance_to(self, time: int) -> None:
        """Let time pass. Raises InvariantError if something ends before ``time``: its end comes first."""
        end = self.next_end
        if end is not None and end < time:
            raise InvariantError(f"a grant or a copy ends at {end}, before {time}")
        self._clock.advance_to(time)
        while self._copier.next_end == time:
            self._events.append(self._copier.end()[1])
        while self._next_retirement() == time:
            self._retire(self._in_flight.pop(heapq.heappop(self._ends)[2]))

    def _ends_at(self, progress: Progress) -> None:
        heapq.heappush(self._ends, (progress.end, next(self._order), progress.grant.id))

    def _row_progress(self, progress: Progress, index: int, time: int) -> int:
        since = time - progress.begin
        if progress.grant.phase is Phase.DECODE:
            return min(since // self._rates.tbt, progress.made[index])
        read = int(since * self._rates.prefill_tokens_per_second / SECOND)
        return min(read, len(progress.grant.rows[index].tokens))

    def _steps_until(self, progress: Progress, time: int) -> int:
        """Decode steps that have begun by ``time``."""
        return -(-(time - progress.begin) // self._rates.tbt)

    def _left(self, row: Row) -> int:
        """Tokens that the request's output still lacks before this row."""
        assert row.choice is not None
        return min(row.choice.remaining, self._output_tokens(row.request) - row.choice.output_index)

    def _retire(self, progress: Progress) -> None:
        grant, made = progress.grant, progress.made
        if grant.phase is Phase.DECODE:
            steps = (progress.end - progress.begin) // self._rates.tbt
            made = [min(tokens, steps) for tokens in made]
        for row, tokens in zip(grant.rows, made, strict=True):
            if tokens and row.request not in progress.cancelled:
                self._make(grant.id, row, tokens)
        passes = max(1, max(made))
        task = Nanoseconds((progress.end - progress.begin) // (2 * self._layers[grant.model] * passes))
        self._events.append(RetiredEvent(grant.id, (task, task)))
        self._watch(progress, made)

    def _make(self, grant: GrantId, row: Row, tokens: int) -> None:
        assert row.choice is not None
        finish = None
        if tokens == self._left(row):
            finish = FinishReason.LENGTH if tokens == row.choice.remaining else FinishReason.STOP
        self._events.extend([TokenEvent(grant, row.request, TOKEN, None)] * (tokens - 1))
        self._events.append(TokenEvent(grant, row.request, TOKEN, finish))
