"""Replays a trace through the real engine, scheduler and KV pool in virtual time.

Every sequence is a micro-batch of its own and has its own speed: nobody waits for anything but pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from crosspool.build.control import assemble
from crosspool.build.pool_plan import PoolPlan
from crosspool.core.batch import Phase
from crosspool.core.config import SECOND, EngineConfig
from crosspool.core.errors import InvariantError, RequestTooLargeError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import ModelInfo
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.spec import ModelSpec
from crosspool.costs.layer import HardwareProfile
from crosspool.engine.engine import Engine
from crosspool.pools.ffn import FfnPool
from crosspool.scheduler.micro_batches import Lanes
from crosspool.scheduler.sequence import Wait
from crosspool.sim.clock import VirtualClock
from crosspool.sim.fluid import TOKEN, FluidExecutor, Progress, Rates
from crosspool.sim.workload import Trace

NOT_YET = -1
EACH_ITS_OWN = 1 << 30


@dataclass(slots=True)
class RequestRecord:
    """What became of one request, in ns of virtual time. ``waits`` are the times it waited for pages, by why;
    ``pauses`` its times between tokens that were longer than a step. ``refused``: it would never fit."""

    model: ModelIndex
    arrival: int
    first_token: int = NOT_YET
    last_token: int = NOT_YET
    tokens: int = 0
    waits: dict[Wait, int] = field(default_factory=dict)
    pauses: list[int] = field(default_factory=list)
    refused: bool = False

    @property
    def waited(self) -> int:
        """Queued, preempted and stalled, together."""
        return sum(self.waits.values())


@dataclass(slots=True)
class ReplayResult:
    """Records in the order of arrival, and samples of the pool's use at equal distances in time.

    ``live`` are bytes of computed tokens, ``held`` bytes of pages that tables hold. ``steps`` counts the
    engine's steps. Both lists cover the time until the last arrival. ``spills`` of the ``preemptions`` were
    copied to host memory, ``spilled_bytes`` together, of which ``returned_bytes`` came back.
    """

    records: list[RequestRecord]
    live: list[int]
    held: list[int]
    pool_bytes: int
    preemptions: int = 0
    steps: int = 0
    spills: int = 0
    spilled_bytes: int = 0
    returned_bytes: int = 0

    def share_waiting(self, longer_than: float = 1.0) -> float:
        """Share of the requests that waited longer than so many seconds."""
        limit = longer_than * SECOND
        return sum(record.waited > limit for record in self.records) / max(1, len(self.records))


def replay(
    trace: Trace,
    config: EngineConfig,
    specs: Mapping[ModelIndex, ModelSpec],
    plan: PoolPlan,
    rates: Rates | None = None,
    *,
    most_tokens: Callable[[int, int], int] = lambda prompt, output: output,
    sample_every: float = 1.0,
    tick: float = 0.0,
) -> ReplayResult:
    """Serve every request of the trace; return when the last has ended.

    ``most_tokens`` says what a client asks for as its request's most tokens, from the numbers of prompt and
    output tokens: the engine knows no more of how long an output will be. ``sample_every`` is in seconds, and
    so is ``tick``: what happens within that time after an event is taken in the same step of the engine.
    """
    return _Replay(trace, config, specs, plan, rates or Rates(), most_tokens, sample_every, tick).run()


class _Replay:
    def __init__(
        self,
        trace: Trace,
        config: EngineConfig,
        specs: Mapping[ModelIndex, ModelSpec],
        plan: PoolPlan,
        rates: Rates,
        most_tokens: Callable[[int, int], int],
        sample_every: float,
        tick: float,
    ) -> None:
        self._arrivals: list[int] = [round(time * SECOND) for time in trace.times]
        self._models = [ModelIndex(int(model)) for model in trace.models]
        self._prompts: list[int] = trace.prompts.tolist()
        self._outputs: list[int] = trace.outputs.tolist()
        self._most_tokens = most_tokens
        self._tbt = rates.tbt
        self._clock = VirtualClock()
        self._executor = FluidExecutor(specs, self._clock, self._outputs.__getitem__, rates, self._retired)
        self._engine = _assemble(config, specs, plan, self._executor, self._clock)
        self._kv_bytes = [spec.kv_bytes_per_token for spec in specs.values()]
        self._records: list[RequestRecord] = []
        self._computed: dict[RequestId, int] = {}
        self._waiting: dict[RequestId, tuple[Wait, int]] = {}
        self._sample_every = round(sample_every * SECOND)
        self._tick = round(tick * SECOND)
        self._result = ReplayResult(self._records, [], [], plan.kv_pool_bytes)

    def run(self) -> ReplayResult:
        """Arrivals and ends of grants, in the order of time; the engine takes a step after each."""
        while (time := self._next_time()) is not None:
            self._sample_until(time)
            self._pass_to(time + self._tick)
            self._step()
        if self._engine.has_work():
            raise InvariantError("requests are left, but nothing is in flight")
        self._engine.check()
        for model in self._engine.stats().models:
            self._result.preemptions += model.preemptions
            self._result.spills += model.spilled_sequences
            self._result.spilled_bytes += model.spilled_bytes
            self._result.returned_bytes += model.returned_bytes
        return self._result

    def _pass_to(self, limit: int) -> None:
        """Everything that happens until then without the engine."""
        while (time := self._next_time()) is not None and time <= limit:
            self._executor.advance_to(time)
            arrived = len(self._records)
            while arrived < len(self._arrivals) and self._arrivals[arrived] == time:
                self._arrive()
                arrived += 1
        self._executor.advance_to(limit)

    def _next_time(self) -> int | None:
        end, arrived = self._executor.next_end, len(self._records)
        if arrived == len(self._arrivals):
            return end
        return self._arrivals[arrived] if end is None else min(end, self._arrivals[arrived])

    def _arrive(self) -> None:
        identity = RequestId(len(self._records))
        model, prompt = self._models[identity], self._prompts[identity]
        most = self._most_tokens(prompt, self._outputs[identity])
        self._records.append(RequestRecord(model, self._clock.now()))
        request = Request(
            identity,
            model,
            (identity, *(TOKEN,) * (prompt - 1)),
            SamplingParams(max_tokens=most),
            most,
            seed=0,
            stop_token_ids=frozenset(),
            arrival=self._clock.now(),
        )
        try:
            self._engine.add(request)
        except RequestTooLargeError:
            self._records[-1].refused = True

    def _step(self) -> None:
        self._result.steps += 1
        for output in self._engine.step():
            if output.finish_reason is not None:
                del self._computed[output.request]
        now, waits = self._clock.now(), self._engine.waits()
        for request in self._waiting.keys() - waits.keys():
            self._end_wait(request, now)
        for request, why in waits.items():
            known = self._waiting.get(request)
            if known is None or known[0] is not why:
                if known is not None:
                    self._end_wait(request, now)
                self._waiting[request] = (why, now)
                if why is Wait.PREEMPTED:
                    self._computed.pop(request, None)

    def _end_wait(self, request: RequestId, now: int) -> None:
        why, since = self._waiting.pop(request)
        waits = self._records[request].waits
        waits[why] = waits.get(why, 0) + now - since

    def _retired(self, progress: Progress, made: list[int]) -> None:
        """Note when the tokens of a grant came: all but its first at equal distances."""
        decode = progress.grant.phase is Phase.DECODE
        for row, tokens in zip(progress.grant.rows, made, strict=True):
            record = self._records[row.request]
            self._computed[row.request] = row.start + len(row.tokens) + max(0, tokens - 1)
            if tokens == 0:
                continue
            first = progress.begin + self._tbt if decode else progress.end
            if record.first_token == NOT_YET:
                record.first_token = first
            elif first - record.last_token > self._tbt:
                record.pauses.append(first - record.last_token)
            record.last_token = first + (tokens - 1) * self._tbt
            record.tokens += tokens

    def _sample_until(self, time: int) -> None:
        """What the pool holds between the engine's last step and the next."""
        result, last = self._result, min(time, self._arrivals[-1])
        while len(result.held) * self._sample_every < last:
            stats = self._engine.stats()
            now = len(result.held) * self._sample_every
            tokens = self._computed | self._executor.computed(now)
            result.live.append(
                sum(count * self._kv_bytes[self._models[request]] for request, count in tokens.items())
            )
            result.held.append((stats.kv_pages_total - stats.kv_pages_free) * stats.page_bytes)


def _assemble(
    config: EngineConfig,
    specs: Mapping[ModelIndex, ModelSpec],
    plan: PoolPlan,
    executor: FluidExecutor,
    clock: VirtualClock,
) -> Engine:
    ffn_pool = FfnPool(sum(spec.total_ffn_bytes for spec in specs.values()))
    for index, spec in specs.items():
        ffn_pool.begin_load(index, config.models[index].name, [spec.total_ffn_bytes])
        ffn_pool.finish_load(index, pinned=False)
    models = [ModelInfo(model.name, ModelIndex(i), model.path) for i, model in enumerate(config.models)]
    # Predictions are corrected by what grants take.
    profile = HardwareProfile(task_overhead=Nanoseconds(1))
    lanes = Lanes(EACH_ITS_OWN, EACH_ITS_OWN)
    config = replace(
        config,
        # A trace has no content: no two of its prompts begin alike.
        pools=replace(config.pools, prefix_cache=False),
        scheduler=replace(config.scheduler, max_prefill_rows=1),
    )
    return assemble(config, models, specs, plan, ffn_pool, executor, clock, profile, lanes)
