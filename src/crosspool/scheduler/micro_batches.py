"""Micro-batches: which are in flight, and how new ones are formed from idle sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count
from typing import NamedTuple

from crosspool.core.batch import Grant, Phase, RetiredEvent, Row
from crosspool.core.config import SchedulerConfig
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.scheduler.batching import choose_chunks, choose_decodes, decode_row, phase_of, prefill_row
from crosspool.scheduler.pipeline import Pipeline, Times
from crosspool.scheduler.prefixes import Prefixes
from crosspool.scheduler.running import RunningSequences
from crosspool.scheduler.sequence import Sequence, State

Lane = tuple[ModelIndex, KvDevice, Phase]


class Lanes(NamedTuple):
    """How many micro-batches of one phase may be in flight on a KV device: of a model that runs alone (2
    where the pools are on different devices), and of each model among several."""

    alone: int = 1
    in_company: int = 1


class MicroBatches:
    """Forms micro-batches of those of all ``sequences`` that are ``running``, and holds pages for them."""

    def __init__(
        self,
        sequences: Mapping[RequestId, Sequence],
        running: RunningSequences,
        prefixes: Prefixes,
        pipeline: Pipeline,
        config: SchedulerConfig,
        lanes: Lanes,
    ) -> None:
        self._sequences = sequences
        self._running = running
        self._prefixes = prefixes
        self._pipeline = pipeline
        self._config = config
        self._lanes = lanes
        self._grants: dict[GrantId, Grant] = {}
        self._in_lane: Counter[Lane] = Counter()
        self._left_over: set[Lane] = set()
        self._recalled: set[GrantId] = set()
        self._ids = count()

    def form(self, now: Nanoseconds) -> list[Grant]:
        """Every micro-batch that can be put in flight now. Its pages are held before it is returned."""
        grants: list[Grant] = []
        self._left_over = set()
        limit = self._lane_limit()
        for lane, sequences in sorted(self._idle_by_lane().items(), key=lambda item: item[0]):
            while self._in_lane[lane] < limit:
                grant = self._form(lane, sequences, limit, now)
                if grant is None:
                    break
                grants.append(grant)
            if self._ready(sequences):
                self._left_over.add(lane)
        return grants

    def retired(self, event: RetiredEvent) -> Grant:
        """The micro-batch that is over."""
        grant = self._grants.pop(event.grant)
        self._recalled.discard(event.grant)
        self._in_lane[grant.model, grant.kv_device, grant.phase] -= 1
        self._pipeline.retired(grant, event.layer_times)
        return grant

    def recalls(self) -> list[GrantId]:
        """Decodes in flight that somebody waits for, each named once: a sequence that could join its rows, or
        one that stalls for want of pages that a row may have to give up."""
        wanted = [grant for grant in self._grants.values() if self._is_waited_for(grant)]
        new = [grant.id for grant in wanted if grant.id not in self._recalled]
        self._recalled.update(new)
        return new

    def _is_waited_for(self, grant: Grant) -> bool:
        if grant.phase is not Phase.DECODE or grant.steps == 1:
            return False
        if self._running.stalled and any(
            self._running.stalls_before(self._sequences[row.request]) for row in grant.rows
        ):
            return True
        has_room = len(grant.rows) < self._config.max_batch_rows or grant.steps > self._config.turn_steps
        return has_room and (grant.model, grant.kv_device, grant.phase) in self._left_over

    def _idle_by_lane(self) -> dict[Lane, list[Sequence]]:
        idle: dict[Lane, list[Sequence]] = {}
        for sequence in self._running:
            if sequence.idle:
                table = sequence.table
                assert table is not None
                lane = (sequence.request.model, table.device, phase_of(sequence))
                idle.setdefault(lane, []).append(sequence)
        return idle

    def _lane_limit(self) -> int:
        """Micro-batches of one phase per model and device. A lone model on two devices splits its work in
        two, so that neither side idles."""
        alone, in_company = self._lanes
        if alone == in_company:
            return alone
        return in_company if len({s.request.model for s in self._running}) > 1 else alone

    def _form(self, lane: Lane, sequences: list[Sequence], limit: int, now: Nanoseconds) -> Grant | None:
        """One micro-batch of this lane's idle sequences, or None if there is none or no page for it."""
        ready = self._ready(sequences)
        if not ready:
            return None
        if lane[2] is Phase.DECODE:
            return self._form_decode(lane, ready, limit)
        return self._form_prefill(lane, ready, now)

    def _ready(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        return [s for s in sequences if s.idle and s.table is not None and not self._running.is_stalled(s)]

    def _form_decode(self, lane: Lane, ready: list[Sequence], limit: int) -> Grant | None:
        most = self._config.max_batch_rows
        if limit > 1:
            most = min(most, max(1, -(-len(ready) // (limit - self._in_lane[lane]))))
        most_steps = self._config.decode_steps
        if len(ready) > self._config.max_batch_rows * (limit - self._in_lane[lane]):
            most_steps = min(most_steps, self._config.turn_steps)
        members: list[tuple[Sequence, int]] = []
        for sequence in choose_decodes(ready, most):
            steps = self._hold_steps(sequence, most_steps)
            if steps:
                members.append((sequence, steps))
        members = [(s, steps) for s, steps in members if s.state is State.DECODING]
        if not members:
            return None
        times = self._pipeline.decode_times(lane[0], [s for s, _ in members])
        rows = [decode_row(s, steps) for s, steps in members]
        return self._grant(lane, [s for s, _ in members], rows, max(steps for _, steps in members), times)

    def _form_prefill(self, lane: Lane, ready: list[Sequence], now: Nanoseconds) -> Grant | None:
        chunks: list[tuple[Sequence, int]] = []
        while not chunks and (chosen := self._prefixes.choose(self._ready(ready))):
            chunks = choose_chunks(chosen, partial(self._pipeline.chunk_fits, lane[0]), self._config)
            chunks = [(s, tokens) for s, tokens in chunks if self._running.hold(s, s.computed + tokens)]
            chunks = [(s, tokens) for s, tokens in chunks if s.state is State.PREFILLING]
        if not chunks:
            return None
        for sequence, _ in chunks:
            self._prefixes.submitted(sequence)
        times = self._pipeline.prefill_times(lane[0], chunks, now)
        rows = [prefill_row(s, tokens) for s, tokens in chunks]
        return self._grant(lane, [s for s, _ in chunks], rows, 1, times)

    def _grant(
        self,
        lane: Lane,
        sequences: Iterable[Sequence],
        rows: Iterable[Row],
        steps: int,
        times: Times,
    ) -> Grant:
        model, device, phase = lane
        members = list(sequences)
        elsewhere = {other for s in members if s.table is not None for other in s.table.elsewhere}
        grant = Grant(
            GrantId(next(self._ids)),
            model,
            phase,
            device,
            tuple(rows),
            steps,
            times.start_by,
            times.interval,
            times.layer_cost,
            tuple(sorted(elsewhere)),
        )
        for sequence in members:
            sequence.grant = grant.id
        self._grants[grant.id] = grant
        self._in_lane[lane] += 1
        self._pipeline.submitted(grant, times.pass_time)
        return grant

    def _hold_steps(self, sequence: Sequence, most: int) -> int:
        """Decode steps for which the sequence holds pages: ``most``, fewer, or 0 (stalled)."""
        wanted = min(most, sequence.remaining)
        if self._running.hold_if_free(sequence, sequence.known + wanted - 1):
            return wanted
        if not self._running.hold(sequence, sequence.known):
            return 0
        assert sequence.table is not None
        return min(wanted, sequence.table.tokens - sequence.known + 1)
