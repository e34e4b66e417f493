"""Engines without a model: each request's tokens come from a script, so a test knows every one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from crosspool.core.errors import OverloadedError
from crosspool.core.ids import ModelIndex, RequestId
from crosspool.core.info import EngineInfo, EngineStats, ModelInfo
from crosspool.core.request import EngineOutput, FinishReason, Request, TokenLogprobs

Script = Callable[[Request], Sequence[int]]


def model_info(name: str = "a", index: int = 0, path: str = "", **changes: object) -> ModelInfo:
    values: dict[str, object] = {
        "vocab_size": 1000,
        "max_context": 100,
        "max_pool_tokens": 80,
        "eos_token_ids": (1,),
        **changes,
    }
    return ModelInfo(name, ModelIndex(index), path, **values)


def engine_info(*models: ModelInfo) -> EngineInfo:
    return EngineInfo(
        models=models,
        kv_devices=("cpu:0",),
        weights_devices=("cpu:0",),
        page_bytes=4096,
        kv_pages=16,
        kv_pool_bytes=16 * 4096,
        weights_pool_bytes=0,
        weights_used_bytes=0,
    )


def repeat_prompt(request: Request) -> list[int]:
    """The prompt over and over."""
    prompt = request.prompt_token_ids
    return [prompt[i % len(prompt)] for i in range(request.max_tokens)]


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(-token / 10, 1, tuple((token + i, -(token + i) / 10) for i in range(count)))


@dataclass
class ScriptedEngine:
    """Keeps Engine's contract. Each step makes ``tokens_per_step`` tokens of each running request.

    At most ``queue`` requests are taken at a time.
    """

    info: EngineInfo
    script: Script = repeat_prompt
    tokens_per_step: int = 2
    queue: int = 1000
    added: list[Request] = field(default_factory=list)
    finishes: list[tuple[RequestId, int]] = field(default_factory=list)
    aborts: list[RequestId] = field(default_factory=list)
    steps: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self._running: dict[RequestId, tuple[Request, int]] = {}
        self._ended: list[EngineOutput] = []

    def add(self, request: Request) -> None:
        if len(self._running) >= self.queue:
            raise OverloadedError("the queue is full")
        self.added.append(request)
        self._running[request.id] = (request, 0)

    def finish(self, request: RequestId, at_token: int) -> None:
        self.finishes.append((request, at_token))
        if self._running.pop(request, None):
            self._ended.append(EngineOutput(request, (), finish_reason=FinishReason.STOP))

    def abort(self, request: RequestId) -> None:
        self.aborts.append(request)
        if self._running.pop(request, None):
            self._ended.append(EngineOutput(request, (), finish_reason=FinishReason.ABORT))

    def step(self) -> list[EngineOutput]:
        self.steps += 1
        outputs, self._ended = self._ended, []
        for request, made in list(self._running.values()):
            outputs.append(self._advance(request, made))
        return outputs

    def has_work(self) -> bool:
        return bool(self._running or self._ended)

    def wait(self, timeout: float) -> None:
        raise AssertionError("a scripted engine always has something to say")

    def wake(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats((), 16, 16, 0, 4096, 0, 0)

    def close(self) -> None:
        self.closed = True

    def _advance(self, request: Request, made: int) -> EngineOutput:
        tokens: list[int] = []
        finish = None
        for token in self.script(request)[made : made + self.tokens_per_step]:
            tokens.append(token)
            count = made + len(tokens)
            if token in request.stop_token_ids and count > request.sampling.min_tokens:
                finish = FinishReason.STOP
            elif count == request.max_tokens:
                finish = FinishReason.LENGTH
            if finish:
                break
        if finish:
            del self._running[request.id]
        else:
            self._running[request.id] = (request, made + len(tokens))
        count = request.sampling.logprobs
        logprobs = () if count is None else tuple(logprobs_of(token, count) for token in tokens)
        return EngineOutput(request.id, tuple(tokens), logprobs, finish)


class ScriptedClient:
    """An EngineClient over a ScriptedEngine that steps whenever the event loop lets it."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.closed = False
        self._streams: dict[RequestId, asyncio.Queue[EngineOutput]] = {}

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    async def generate(self, request: Request) -> AsyncIterator[EngineOutput]:
        self.engine.add(request)
        stream = self._streams[request.id] = asyncio.Queue()
        ended = False
        try:
            while not ended:
                await asyncio.sleep(0)
                if stream.empty():
                    for output in self.engine.step():
                        if output.request in self._streams:
                            self._streams[output.request].put_nowait(output)
                    continue
                output = stream.get_nowait()
                ended = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request.id]
            if not ended:
                self.abort(request.id)

    def finish(self, request: RequestId, at_token: int) -> None:
        self.engine.finish(request, at_token)

    def abort(self, request: RequestId) -> None:
        self.engine.abort(request)

    async def stats(self) -> EngineStats:
        return self.engine.stats()

    async def close(self) -> None:
        self.closed = True
        self.engine.close()
