"""LLM: generate in this process, blocking, for offline work."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from crosspool.build.start import start_engine
from crosspool.core.config import SchedulerConfig, WeightsMemory
from crosspool.core.errors import EngineDeadError, InvalidRequestError, InvariantError, OverloadedError
from crosspool.core.ids import RequestId
from crosspool.core.info import EngineStats, ModelInfo
from crosspool.core.request import EngineOutput, Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding
from crosspool.llm.fronts import Fronts
from crosspool.llm.options import Models, engine_config
from crosspool.llm.outputs import RequestOutput, completion
from crosspool.text.chat_template import Message
from crosspool.text.front import ModelFront, Prompt, Submission
from crosspool.text.output import OutputAssembler, TextDelta

if TYPE_CHECKING:
    from crosspool.engine.engine import Engine

Params = SamplingParams | Sequence[SamplingParams] | None

WAIT_SECONDS = 1.0


class LLM:
    """Models of one engine behind blocking calls. Used from one thread; close it, or use ``with``.

    ``models`` is {name: folder}, or a list of folders and "name=folder". Sizes are bytes; None lets the
    engine choose. ``seed`` makes the draws of requests without a seed of their own reproducible. A model that
    cannot be loaded raises ModelUnavailableError when it is asked for; the others serve. Raises ConfigError,
    OutOfMemoryError, and ModelLoadError if no model can be loaded.
    """

    def __init__(
        self,
        models: Models,
        *,
        kv_pool_bytes: int | None = None,
        weights_pool_bytes: int | None = None,
        page_bytes: int | None = None,
        dtype: str = "auto",
        weights_dtype: str = "auto",
        weights_memory: WeightsMemory | str = WeightsMemory.MAPPED,
        prefix_cache: bool = True,
        spill_bytes: int | None = None,
        kv_devices: Sequence[str] = ("cpu:0",),
        weights_devices: Sequence[str] = ("cpu:0",),
        sharding: Sharding | str = Sharding.LAYER,
        threads: int | None = None,
        seed: int = 0,
        scheduler: SchedulerConfig | None = None,
    ) -> None:
        config = engine_config(
            models,
            kv_pool_bytes=kv_pool_bytes,
            weights_pool_bytes=weights_pool_bytes,
            page_bytes=page_bytes,
            dtype=dtype,
            weights_dtype=weights_dtype,
            weights_memory=weights_memory,
            prefix_cache=prefix_cache,
            spill_bytes=spill_bytes,
            kv_devices=kv_devices,
            weights_devices=weights_devices,
            sharding=sharding,
            threads=threads,
            scheduler=scheduler,
        )
        self._use(start_engine(config), seed)

    @classmethod
    def from_engine(cls, engine: Engine, *, seed: int = 0) -> Self:
        """An LLM over an engine that is already there, which it then owns."""
        llm = cls.__new__(cls)
        llm._use(engine, seed)
        return llm

    def _use(self, engine: Engine, seed: int) -> None:
        try:
            self._fronts = Fronts.open(engine.info)
        except BaseException:
            engine.close()
            raise
        self._engine = engine
        self._generator = random.Random(seed)
        self._ids = count()
        self._closed = False

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return self._engine.info.models

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        model: str | Sequence[str] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts: a text, a list of token ids, or a list of either. One output each, in order.

        ``params`` and ``model`` are for all prompts, or lists with one for each: then several models work at
        the same time. ``model`` may be left out if there is only one. Prompts are all checked before the
        first is started. Raises RequestError (a prompt or a parameter is at fault) or ModelUnavailableError.
        """
        each = _prompts(prompts)
        names = [model] * len(each) if model is None or isinstance(model, str) else list(model)
        if len(names) != len(each):
            raise InvalidRequestError(f"{len(names)} models for {len(each)} prompts", parameter="model")
        submissions = []
        for prompt, name, one in zip(each, names, _one_for_each(params, len(each)), strict=True):
            front = self._fronts.get(name)
            submissions.append(self._submission(front, front.prompt_tokens(prompt), one))
        texts = [prompt if isinstance(prompt, str) else None for prompt in each]
        return self._run(submissions, texts)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list, by the model's chat template. See ``generate``."""
        front = self._fronts.get(model)
        several = bool(messages) and not isinstance(messages[0], Mapping)
        each = cast("Sequence[Sequence[Message]]", messages if several else [messages])
        submissions = []
        for conversation, one in zip(each, _one_for_each(params, len(each)), strict=True):
            token_ids = front.chat_tokens(conversation, tools=tools, variables=chat_template_kwargs)
            submissions.append(self._submission(front, token_ids, one))
        return self._run(submissions, [None] * len(submissions))

    def close(self) -> None:
        """Stop the workers and give back the pools' memory. Closing twice does no harm."""
        if not self._closed:
            self._closed = True
            self._fronts.close()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submission(
        self, front: ModelFront, token_ids: tuple[int, ...], params: SamplingParams
    ) -> Submission:
        return front.submit(token_ids, params, lambda: RequestId(next(self._ids)), self._generator)

    def _run(self, submissions: Sequence[Submission], prompts: Sequence[str | None]) -> list[RequestOutput]:
        if self._closed:
            raise EngineDeadError("this LLM is closed")
        run = _Run(self._engine, submissions)
        run.to_the_end()
        return [
            RequestOutput(
                model=submission.model.name,
                prompt=prompt,
                prompt_token_ids=list(submission.prompt_token_ids),
                completions=[
                    completion(run.deltas[request.id], i) for i, request in enumerate(submission.requests)
                ],
            )
            for submission, prompt in zip(submissions, prompts, strict=True)
        ]


class _Run:
    """The requests of one call on their way through the engine."""

    def __init__(self, engine: Engine, submissions: Sequence[Submission]) -> None:
        self._engine = engine
        self._assemblers: dict[RequestId, OutputAssembler] = {}
        self._waiting: deque[Request] = deque()
        self._unfinished: set[RequestId] = set()
        self.deltas: dict[RequestId, list[TextDelta]] = {}
        for submission in submissions:
            self._waiting.extend(submission.requests)
            for request, assembler in zip(submission.requests, submission.assemblers(), strict=True):
                self._assemblers[request.id] = assembler
                self.deltas[request.id] = []

    def to_the_end(self) -> None:
        """Until every request has finished and given back what it held. On any error all are aborted."""
        try:
            while self._waiting or self._engine.has_work():
                self._add_waiting()
                outputs = self._engine.step()
                for output in outputs:
                    self._take(output)
                if not outputs and self._engine.has_work():
                    self._engine.wait(WAIT_SECONDS)
        except BaseException:
            for request in self._unfinished:
                self._engine.abort(request)
            raise
        if self._unfinished:
            raise InvariantError(
                f"the engine is idle, but {len(self._unfinished)} requests have not finished"
            )

    def _add_waiting(self) -> None:
        """As many as the engine takes now; a full queue has room again later."""
        while self._waiting:
            request = self._waiting[0]
            # Noted before it is added, so that an interrupt in between does not leave it behind.
            self._unfinished.add(request.id)
            try:
                self._engine.add(request)
            except OverloadedError:
                self._unfinished.remove(request.id)
                if not self._engine.has_work():
                    raise
                return
            self._waiting.popleft()

    def _take(self, output: EngineOutput) -> None:
        """Outputs of an earlier, interrupted call and what comes after a stop string are not wanted."""
        assembler = self._assemblers.get(output.request)
        if assembler is None or assembler.finished:
            return
        self.deltas[output.request].append(assembler.feed(output))
        if assembler.finish_at is not None:
            self._engine.finish(output.request, assembler.finish_at)
        if assembler.finished:
            self._unfinished.discard(output.request)


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError("prompts must be text, token ids, or a list of either", parameter="prompt")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _one_for_each(params: Params, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise InvalidRequestError(f"{prompts} prompts but {len(params)} SamplingParams", parameter="params")
    return list(params)
