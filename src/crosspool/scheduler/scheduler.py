"""The scheduler: admission, batching and pipeline over all models.

``schedule`` makes grants; ``take_token`` and ``retire`` take what came of them. No torch, no threads, no
clock of its own. Models advance independently: each has at most a few micro-batches in flight, and nobody
waits for another model's step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count
from typing import NamedTuple

from crosspool.core.batch import Grant, Phase, RetiredEvent, Row, TokenEvent
from crosspool.core.config import SchedulerConfig
from crosspool.core.copies import CopiedEvent, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.pools.kv import KvPool
from crosspool.scheduler.admission import Admission
from crosspool.scheduler.batching import choose_chunks, choose_decodes, decode_row, phase_of, prefill_row
from crosspool.scheduler.output_lengths import OutputLengths
from crosspool.scheduler.pipeline import Pipeline, Times
from crosspool.scheduler.prefixes import Prefixes
from crosspool.scheduler.risk import OutgrowthRisk
from crosspool.scheduler.running import RunningSequences
from crosspool.scheduler.sequence import Sequence, State, Wait
from crosspool.scheduler.spilling import Spilling

Lane = tuple[ModelIndex, KvDevice, Phase]


class Lanes(NamedTuple):
    """How many micro-batches of one phase may be in flight on a KV device: of a model that runs alone (2
    where the pools are on different devices), and of each model among several."""

    alone: int = 1
    in_company: int = 1


class Scheduler:
    """All sequences from arrival to their last page given back.

    ``targets`` gives each model's (TTFT, TBT) targets in ns; ``lanes`` says how many micro-batches of one
    phase a model may have in flight.
    """

    def __init__(
        self,
        pool: KvPool,
        pipeline: Pipeline,
        config: SchedulerConfig,
        targets: Mapping[ModelIndex, tuple[Nanoseconds, Nanoseconds]],
        *,
        lanes: Lanes,
        spilling: Spilling,
    ) -> None:
        self._pool = pool
        self._pipeline = pipeline
        self._config = config
        self._targets = dict(targets)
        self._lanes = lanes
        self._lengths = OutputLengths()
        self._prefixes = Prefixes(pool)
        self._admission = Admission(
            pool,
            self._prefixes,
            OutgrowthRisk(pool, self._lengths, config.outgrowth_risk),
            max_waiting=config.max_waiting,
            max_running=config.max_running,
        )
        self._sequences: dict[RequestId, Sequence] = {}
        self._running = RunningSequences(pool, self._preempt)
        self._spilling = spilling
        self._grants: dict[GrantId, Grant] = {}
        self._in_lane: Counter[Lane] = Counter()
        self._left_over: set[Lane] = set()
        self._recalled: set[GrantId] = set()
        self._ids = count()
        self.moves: Counter[tuple[State, State]] = Counter()
        self.preemptions: Counter[ModelIndex] = Counter()

    # -- requests -------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A new request that fits the pool. Raises OverloadedError if its model's line is full."""
        ttft, tbt = self._targets[request.model]
        sequence = Sequence(request, request.arrival, tbt, self.moves)
        found = self._prefixes.found_tokens(sequence)
        own = self._pipeline.prompt_time(request.model, sequence.known - found, found)
        sequence.due = Nanoseconds(request.arrival + ttft + own)
        self._admission.join(sequence)
        self._sequences[request.id] = sequence

    def get(self, request: RequestId) -> Sequence | None:
        """The sequence, unless it has finished."""
        return self._sequences.get(request)

    def end(self, sequence: Sequence, reason: FinishReason) -> bool:
        """End a sequence now. Returns whether a micro-batch in flight must be told to drop its rows."""
        if sequence.finish is not None:
            return False
        sequence.finish = reason
        if not sequence.idle:
            sequence.move(State.DRAINING)
            return True
        if sequence.state is State.WAITING:
            self._admission.leave(sequence)
        self._forget(sequence)
        return False

    @property
    def spilling(self) -> Spilling:
        """What was copied to host memory and back, for statistics."""
        return self._spilling

    def waiting(self, model: ModelIndex) -> int:
        return self._admission.waiting(model)

    def running(self, model: ModelIndex) -> int:
        return sum(1 for sequence in self._running if sequence.request.model == model)

    def waits(self) -> dict[RequestId, Wait]:
        """Who waits for pages now, and why."""
        waits = {s.request.id: Wait.PREEMPTED if s.preemptions else Wait.QUEUED for s in self._admission}
        copied = (s for s in self._running if s.state in (State.SPILLING, State.RETURNING))
        waits.update((sequence.request.id, Wait.PREEMPTED) for sequence in copied)
        waits.update((request, Wait.STALLED) for request in self._running.stalled)
        return waits

    def __len__(self) -> int:
        """Sequences that have not given back everything."""
        return len(self._sequences)

    # -- decisions ------------------------------------------------------------------------------------

    def schedule(self, now: Nanoseconds) -> list[Grant]:
        """Every micro-batch that can be put in flight now. Its pages are held before it is returned."""
        self._running.serve_stalled()
        for sequence in self._admission.admit(self._running, now):
            self._running.add(sequence)
            sequence.move(State.RETURNING if self._spilling.bring_back(sequence) else State.PREFILLING)
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

    def new_copies(self) -> list[PageCopy]:
        """Copies between KV pages and host memory that follow from what was decided, each named once."""
        return self._spilling.new_copies()

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

    # -- pages ----------------------------------------------------------------------------------------

    def _hold_steps(self, sequence: Sequence, most: int) -> int:
        """Decode steps for which the sequence holds pages: ``most``, fewer, or 0 (stalled)."""
        wanted = min(most, sequence.remaining)
        if self._running.hold_if_free(sequence, sequence.known + wanted - 1):
            return wanted
        if not self._running.hold(sequence, sequence.known):
            return 0
        assert sequence.table is not None
        return min(wanted, sequence.table.tokens - sequence.known + 1)

    def _preempt(self, victim: Sequence) -> None:
        """Take an idle sequence's pages: at once, or when what is in them has been copied."""
        victim.preemptions += 1
        self.preemptions[victim.request.model] += 1
        if self._spilling.spill(victim):
            victim.move(State.SPILLING)
        else:
            self._send_back(victim)

    def _send_back(self, sequence: Sequence) -> None:
        """It gives its pages back and waits in its line. What is not in host memory it will compute again."""
        self._running.give_back(sequence)
        sequence.computed = 0
        sequence.move(State.WAITING)
        self._admission.rejoin(sequence)

    # -- results --------------------------------------------------------------------------------------

    def take_token(self, event: TokenEvent, now: Nanoseconds) -> Sequence | None:
        """A row has a new token. Returns its sequence, or None if it had ended before."""
        sequence = self._sequences.get(event.request)
        if sequence is None or sequence.grant != event.grant:
            raise InvariantError(f"a token of grant {event.grant} came for request {event.request}")
        if sequence.finish is not None:
            return None
        sequence.output.append(event.token)
        sequence.last_token_at = now
        if event.finish is not None:
            sequence.finish = event.finish
            sequence.move(State.DRAINING)
        return sequence

    def retire(self, event: RetiredEvent) -> list[Request]:
        """A micro-batch is over; its rows are idle again, or give their pages back if they have ended.

        Returns the requests that end because the micro-batch failed.
        """
        grant = self._grants.pop(event.grant)
        self._recalled.discard(event.grant)
        self._in_lane[grant.model, grant.kv_device, grant.phase] -= 1
        self._pipeline.retired(grant, event.layer_times)
        failed: list[Request] = []
        for row in grant.rows:
            sequence = self._sequences[row.request]
            sequence.grant = None
            self._prefixes.retired(sequence)
            if event.error is not None and sequence.finish is None:
                sequence.finish = FinishReason.ERROR
                failed.append(sequence.request)
            if event.error is None:
                self._advance(sequence, row)
            if sequence.finish is not None:
                self._forget(sequence)
        return failed

    def copied(self, event: CopiedEvent) -> Request | None:
        """A sequence's pages have been copied to host memory, or back. Returns the request if it ends because
        that failed."""
        sequence, failed = self._spilling.copied(event), None
        if event.error is not None and sequence.finish is None:
            failed, sequence.finish = sequence.request, FinishReason.ERROR
            sequence.move(State.DRAINING)
        if sequence.finish is not None:
            self._forget(sequence)
        elif sequence.state is State.SPILLING:
            self._send_back(sequence)
        else:
            if self._prefixes.publish(sequence):
                self._admission.retry()
            decodes = sequence.output and sequence.pending == 1
            sequence.move(State.DECODING if decodes else State.PREFILLING)
        return failed

    def _advance(self, sequence: Sequence, row: Row) -> None:
        """Count what the row computed: its inputs, and each token it made but the last.

        A row whose request ended in flight may have been dropped before its pass: only its tokens show how
        far it came.
        """
        made = 0 if row.choice is None else len(sequence.output) - row.choice.output_index
        if made < 1 and sequence.finish is not None:
            return
        if row.choice is not None and made < 1:
            raise InvariantError(f"a grant retired without a token for request {row.request}")
        sequence.computed = row.start + len(row.tokens) + max(0, made - 1)
        published = self._prefixes.publish(sequence)
        if sequence.state is State.PREFILLING:
            if published:
                self._admission.retry()
            if made:
                sequence.move(State.DECODING)
        assert sequence.table is not None
        self._pool.trim(sequence.table, sequence.computed)

    def _forget(self, sequence: Sequence) -> None:
        if sequence.finish in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.learn(sequence.request.model, len(sequence.output))
        self._running.give_back(sequence)
        self._spilling.give_back(sequence)
        sequence.move(State.FINISHED)
        del self._sequences[sequence.request.id]

    def check(self) -> None:
        """Raise InvariantError unless pages, tables and states agree. For tests and for idle moments."""
        self._pool.check(s.table for s in self._sequences.values() if s.table is not None)
        self._spilling.check(self._sequences.values())
        for sequence in self._sequences.values():
            holds = sequence.table is not None
            if holds == (sequence.state in (State.WAITING, State.FINISHED)):
                raise InvariantError(f"request {sequence.request.id} is {sequence.state}, pages: {holds}")
            if holds != (sequence in self._running):
                raise InvariantError(f"request {sequence.request.id} runs without pages, or the reverse")
        held = self._pool.total - self._pool.free - self._pool.cached
        if not self._sequences and held:
            raise InvariantError(f"nobody runs, but {held} pages are held")
