"""The scheduler: admission, batching and pipeline over all models.

``schedule`` makes grants; ``take_token`` and ``retire`` take what came of them. No torch, no threads, no
clock of its own. Models advance independently: each has at most a few micro-batches in flight, and nobody
waits for another model's step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from crosspool.core.batch import Grant, RetiredEvent, Row, TokenEvent
from crosspool.core.config import SchedulerConfig
from crosspool.core.copies import CopiedEvent, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.pools.kv import KvPool
from crosspool.scheduler.admission import Admission
from crosspool.scheduler.micro_batches import Lanes, MicroBatches
from crosspool.scheduler.output_lengths import OutputLengths
from crosspool.scheduler.pipeline import Pipeline
from crosspool.scheduler.prefixes import Prefixes
from crosspool.scheduler.risk import OutgrowthRisk
from crosspool.scheduler.running import RunningSequences
from crosspool.scheduler.sequence import Sequence, State, Wait
from crosspool.scheduler.spilling import Spilling


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
        self._targets = dict(targets)
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
        self._micro_batches = MicroBatches(
            self._sequences, self._running, self._prefixes, pipeline, config, lanes
        )
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
        return self._micro_batches.form(now)

    def new_copies(self) -> list[PageCopy]:
        """Copies between KV pages and host memory that follow from what was decided, each named once."""
        return self._spilling.new_copies()

    def recalls(self) -> list[GrantId]:
        """Decodes in flight that somebody waits for, each named once."""
        return self._micro_batches.recalls()

    # -- pages ----------------------------------------------------------------------------------------

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
        grant = self._micro_batches.retired(event)
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
