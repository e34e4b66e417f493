"""AsyncLLM: streams of text over any engine, here or in another process. The server is built on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import count
from typing import Any, Self, TypeVar

from crosspool.build.start import start_engine
from crosspool.core.ids import RequestId
from crosspool.core.info import EngineInfo, EngineStats, ModelInfo
from crosspool.core.request import EngineOutput, Request
from crosspool.core.sampling import SamplingParams
from crosspool.engine.async_engine import AsyncEngine
from crosspool.engine.client import EngineClient
from crosspool.llm.arrivals import Arrivals
from crosspool.llm.fronts import Fronts
from crosspool.llm.options import Models, engine_config
from crosspool.text.chat_template import Message
from crosspool.text.front import ModelFront, Prompt, Submission
from crosspool.text.output import OutputAssembler, TextDelta

T = TypeVar("T")


class AsyncLLM:
    """Prompts in, streams of TextDelta out. Used from one event loop.

    Owns the client and the fronts: ``close`` closes them. ``generator`` seeds requests that have no seed.
    """

    def __init__(
        self, client: EngineClient, fronts: Iterable[ModelFront], *, generator: random.Random | None = None
    ) -> None:
        self._client = client
        self._use(list(fronts))
        self._generator = generator or random.Random()
        self._ids = count()

    @classmethod
    async def open(cls, client: EngineClient) -> Self:
        """Over an engine, with the tokenizers and templates of its models' folders."""
        return cls(client, await _open_fronts(client.info))

    @classmethod
    async def build(cls, models: Models, **options: Any) -> Self:
        """With an engine of its own in this process; takes LLM's keyword arguments but for the seed."""
        client = AsyncEngine(await asyncio.to_thread(start_engine, engine_config(models, **options)))
        try:
            return await cls.open(client)
        except BaseException:
            await client.close()
            raise

    async def reopen(self) -> None:
        """Open tokenizers and templates again: the client's engine was started anew, and its models may have
        other lengths or other errors. What is being prepared goes on with the old ones."""
        fronts = await _open_fronts(self._client.info)
        old_fronts, old_threads = self._fronts, self._threads
        self._use(fronts)
        for name, threads in old_threads.items():
            # After what is being prepared: a template's process would be started again for it.
            threads.submit(old_fronts.get(name).close)
            threads.shutdown(wait=False)

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return self._client.info.models

    def front(self, model: str | None) -> ModelFront:
        """Tokenizer and template of a model. Raises ModelNotFoundError or ModelUnavailableError."""
        return self._fronts.get(model)

    async def with_front(self, model: str | None, work: Callable[[ModelFront], T]) -> T:
        """What ``work`` makes of a model's front, off the event loop.

        Each model has one thread for this: a long text or a slow template delays only its own model. Raises
        ModelNotFoundError, ModelUnavailableError, and what ``work`` raises.
        """
        front = self._fronts.get(model)
        threads = self._threads[front.model.name]
        return await asyncio.get_running_loop().run_in_executor(threads, work, front)

    async def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        tenant: bytes = b"",
    ) -> Submission:
        """Check and tokenize a prompt, off the event loop. What is wrong with it is raised here:
        RequestError or ModelUnavailableError. Only requests of one ``tenant`` share computed prefixes."""
        token_ids = await self.with_front(model, lambda front: front.prompt_tokens(prompt))
        return self._submission(model, token_ids, params, tenant)

    async def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tenant: bytes = b"",
    ) -> Submission:
        """The same for a conversation, rendered by the model's chat template."""
        token_ids = await self.with_front(
            model, lambda front: front.chat_tokens(messages, tools=tools, variables=chat_template_kwargs)
        )
        return self._submission(model, token_ids, params, tenant)

    def stream(self, *submissions: Submission) -> AsyncGenerator[TextDelta, None]:
        """Run them all and yield deltas as they come, each choice until one with a finish reason.

        Choices are numbered through all submissions in order, n for each. Closing the generator or cancelling
        its task aborts what still runs, and so does an error: OverloadedError, EngineDeadError,
        ModelUnavailableError.
        """
        choices: list[AsyncGenerator[TextDelta, None]] = []
        for submission in submissions:
            assemblers = submission.assemblers(first_index=len(choices))
            choices += map(self._choice, submission.requests, assemblers)
        return choices[0] if len(choices) == 1 else _merge(choices)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, model: str | None = None
    ) -> AsyncGenerator[TextDelta, None]:
        """``prepare`` and ``stream`` in one."""
        async with aclosing(self.stream(await self.prepare(prompt, params, model=model))) as deltas:
            async for delta in deltas:
                yield delta

    async def stats(self) -> EngineStats:
        return await self._client.stats()

    async def close(self) -> None:
        """Close the engine's client and end the template processes."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._fronts.close)
        await self._client.close()

    def _use(self, fronts: Sequence[ModelFront]) -> None:
        self._fronts = Fronts(self._client.info, fronts)
        self._threads = {front.model.name: ThreadPoolExecutor(max_workers=1) for front in fronts}

    def _submission(
        self, model: str | None, token_ids: tuple[int, ...], params: SamplingParams | None, tenant: bytes
    ) -> Submission:
        return self._fronts.get(model).submit(
            token_ids,
            params or SamplingParams(),
            lambda: RequestId(next(self._ids)),
            self._generator,
            tenant,
        )

    async def _choice(self, request: Request, assembler: OutputAssembler) -> AsyncGenerator[TextDelta, None]:
        outputs = self._client.generate(request)
        try:
            async for output in outputs:
                if assembler.finished:
                    continue  # what the engine made before it heard of the stop string
                delta = assembler.feed(output)
                if assembler.finish_at is not None:
                    self._client.finish(request.id, assembler.finish_at)
                yield delta
        finally:
            await _close(outputs)


async def _open_fronts(info: EngineInfo) -> list[ModelFront]:
    serving = [model for model in info.models if model.error is None]
    return await asyncio.gather(*(asyncio.to_thread(ModelFront.open, model) for model in serving))


async def _close(outputs: AsyncIterator[EngineOutput]) -> None:
    if isinstance(outputs, AsyncGenerator):
        await outputs.aclose()


async def _merge(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> AsyncGenerator[TextDelta, None]:
    """Items of all streams as they come. An error in one ends them all."""
    arrivals: Arrivals[TextDelta | Exception | None] = Arrivals()

    async def forward(stream: AsyncGenerator[TextDelta, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    arrivals.put(item)
            arrivals.put(None)
        except Exception as error:
            arrivals.put(error)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        open_streams = len(tasks)
        while open_streams:
            for item in await arrivals.take():
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
