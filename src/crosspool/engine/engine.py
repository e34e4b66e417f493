"""The engine: one step takes what came back, decides, and submits what runs next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from crosspool.core.batch import RetiredEvent, TokenEvent
from crosspool.core.copies import CopiedEvent, Direction
from crosspool.core.errors import InvalidRequestError, InvariantError
from crosspool.core.ids import ModelIndex, RequestId
from crosspool.core.info import EngineInfo, EngineStats, ModelInfo, ModelStats
from crosspool.core.protocols import Clock, Executor
from crosspool.core.request import EngineOutput, FinishReason, Request, TokenLogprobs
from crosspool.pools.kv import KvPool
from crosspool.scheduler.scheduler import Scheduler
from crosspool.scheduler.sequence import Sequence, Wait


@dataclass(slots=True)
class _Counters:
    """What one model did since the start. A prompt counts when it has been read: at its first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _News:
    """What happened to one request within one step."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    finish: FinishReason | None = None

    def output(self, request: RequestId) -> EngineOutput:
        return EngineOutput(
            request,
            tuple(self.tokens),
            tuple(self.logprobs),
            self.finish,
            cached_tokens=self.cached_tokens,
        )


class Engine:
    """Requests in, tokens out. Single-threaded: ``add``, ``finish``, ``abort`` and ``step`` are called from
    one thread; only ``wake`` may come from others."""

    def __init__(
        self, info: EngineInfo, scheduler: Scheduler, pool: KvPool, executor: Executor, clock: Clock
    ) -> None:
        self.info = info
        self._scheduler = scheduler
        self._pool = pool
        self._executor = executor
        self._clock = clock
        self._counters: Mapping[ModelIndex, _Counters] = {m.index: _Counters() for m in info.models}
        self._news: dict[RequestId, _News] = {}
        self._ended: list[EngineOutput] = []
        self._undecided = False

    def add(self, request: Request) -> None:
        """Queue a request; its arrival is now.

        Raises ModelUnavailableError, RequestTooLargeError (context or pool, with the numbers) or
        OverloadedError.
        """
        model = self._model(request)
        if self._scheduler.get(request.id) is not None:
            raise InvariantError(f"request id {request.id} is in use")
        self._check_size(request, model)
        self._scheduler.add(replace(request, arrival=self._clock.now()))
        self._undecided = True

    def finish(self, request: RequestId, at_token: int) -> None:
        """End a request with STOP after its first ``at_token`` output tokens (a stop string was seen)."""
        self._take_events()
        sequence = self._scheduler.get(request)
        if sequence is not None and sequence.finish is None:
            del sequence.output[at_token:]
            self._news.pop(request, None)
            self._end(sequence, FinishReason.STOP)

    def abort(self, request: RequestId) -> None:
        """End a request with ABORT. Its pages are free at once, or when its micro-batch in flight retires."""
        self._take_events()
        sequence = self._scheduler.get(request)
        if sequence is not None and sequence.finish is None:
            self._end(sequence, FinishReason.ABORT)

    def step(self) -> list[EngineOutput]:
        """Take what the executor has done, put in flight what can run, say what is new. Never blocks."""
        outputs = self.take()
        self.decide()
        return outputs

    def take(self) -> list[EngineOutput]:
        """What is new: the first half of a step. With ``stream_to``, pass it on before the second."""
        self._take_events()
        outputs = [item.output(request) for request, item in self._news.items()] + self._ended
        self._news, self._ended = {}, []
        return outputs

    def decide(self) -> None:
        """Put in flight what can run: the second half of a step.

        Tokens alone change nothing of what the scheduler decides by: who is idle, which pages are free. So
        nothing is tried again until a request has come or ended, a micro-batch has retired, a copy is over,
        or the decisions themselves have sent somebody back to wait.
        """
        if not self._undecided:
            return
        preemptions = self._scheduler.preemptions.total()
        for grant in self._scheduler.schedule(self._clock.now()):
            self._executor.submit(grant)
        for copy in self._scheduler.new_copies():
            self._executor.copy(copy)
        for recalled in self._scheduler.recalls():
            self._executor.recall(recalled)
        self._undecided = self._scheduler.preemptions.total() != preemptions
        if self._undecided:
            self._executor.wake()

    def stream_to(self, pipe: int) -> None:
        """Let tokens go into a pipe as they are made (Executor.stream_to); ``take`` then leaves those out."""
        self._executor.stream_to(pipe)

    def waits(self) -> dict[RequestId, Wait]:
        """Who waits for pages of the KV pool now, and why."""
        return self._scheduler.waits()

    def has_work(self) -> bool:
        """Whether any request has not given back everything, or an output has not been fetched."""
        return len(self._scheduler) > 0 or bool(self._ended) or bool(self._news)

    def wait(self, timeout: float) -> None:
        """Block until ``step`` may have something to do, or ``timeout`` seconds have passed."""
        self._executor.wait(timeout)

    def wake(self) -> None:
        """End a ``wait``; may be called from any thread."""
        self._executor.wake()

    def stats(self) -> EngineStats:
        """A snapshot of counters and pools."""
        self._take_events()
        return EngineStats(
            models=tuple(self._model_stats(model) for model in self.info.models),
            kv_pages_total=self._pool.total,
            kv_pages_free=self._pool.free,
            kv_pages_cached=self._pool.cached,
            page_bytes=self.info.page_bytes,
            weights_pool_bytes=self.info.weights_pool_bytes,
            weights_used_bytes=self.info.weights_used_bytes,
            spill_store_bytes=self.info.spill_store_bytes,
            spill_used_bytes=self._scheduler.spilling.store.used * self.info.page_bytes,
        )

    def check(self) -> None:
        """Raise InvariantError unless pages, tables and states agree."""
        self._scheduler.check()

    def close(self) -> None:
        """Stop the workers."""
        self._executor.close()

    def _model(self, request: Request) -> ModelInfo:
        model = self.info.models[request.model]
        model.check_serves()
        return model

    def _check_size(self, request: Request, model: ModelInfo) -> None:
        prompt = len(request.prompt_token_ids)
        if prompt == 0:
            raise InvalidRequestError("the prompt is empty", parameter="prompt")
        if request.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens must be at least 1, not {request.max_tokens}", parameter="max_tokens"
            )
        model.check_length(prompt, request.max_tokens)

    def _take_events(self) -> None:
        now = self._clock.now()
        for event in self._executor.poll():
            if isinstance(event, RetiredEvent):
                self._retire(event)
            elif isinstance(event, CopiedEvent):
                self._undecided = True
                if (request := self._scheduler.copied(event)) is not None:
                    self._say_ended(request, FinishReason.ERROR, event.error)
            elif (sequence := self._scheduler.take_token(event, now)) is not None:
                self._count(event, sequence)
                if not event.delivered:
                    self._note(event)

    def _count(self, event: TokenEvent, sequence: Sequence) -> None:
        counters = self._counters[sequence.request.model]
        if len(sequence.output) == 1:
            counters.prompt_tokens += len(sequence.request.prompt_token_ids)
            counters.cached_tokens += sequence.cached_tokens
            if sequence.cached_tokens:
                self._news_of(event.request).cached_tokens = sequence.cached_tokens
        counters.generation_tokens += 1
        if event.finish is not None:
            counters.finished[event.finish] += 1

    def _note(self, event: TokenEvent) -> None:
        item = self._news_of(event.request)
        item.tokens.append(event.token)
        if event.logprobs is not None:
            item.logprobs.append(event.logprobs)
        item.finish = event.finish

    def _news_of(self, request: RequestId) -> _News:
        item = self._news.get(request)
        if item is None:
            item = self._news[request] = _News()
        return item

    def _retire(self, event: RetiredEvent) -> None:
        self._undecided = True
        for request in self._scheduler.retire(event):
            self._say_ended(request, FinishReason.ERROR, event.error)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._undecided = True
        if self._scheduler.end(sequence, reason):
            self._executor.cancel(sequence.request.id)
        self._say_ended(sequence.request, reason)

    def _say_ended(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._counters[request.model].finished[reason] += 1
        self._ended.append(EngineOutput(request.id, (), finish_reason=reason, error=error))

    def _model_stats(self, model: ModelInfo) -> ModelStats:
        index = model.index
        if model.error is not None:
            return ModelStats(model.name, finished={})
        counters, spilling = self._counters[index], self._scheduler.spilling
        return ModelStats(
            name=model.name,
            running=self._scheduler.running(index),
            waiting=self._scheduler.waiting(index),
            preemptions=self._scheduler.preemptions[index],
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generation_tokens=counters.generation_tokens,
            kv_pages_held=self._pool.held_by(index),
            prefix_cache=model.prefix_cache,
            cached_pages_evicted=self._pool.evicted[index],
            finished=dict(counters.finished),
            spilled_sequences=spilling.sequences[index, Direction.OUT],
            spilled_bytes=spilling.bytes[index, Direction.OUT],
            returned_sequences=spilling.sequences[index, Direction.IN],
            returned_bytes=spilling.bytes[index, Direction.IN],
        )
