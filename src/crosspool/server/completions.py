"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from crosspool.llm import Submission, TextDelta
from crosspool.server import generation, sse
from crosspool.server.logprobs import characters_begun, completion_logprobs
from crosspool.server.openai_requests import CompletionRequest
from crosspool.server.openai_responses import Completion, CompletionChoice, Usage, json_response
from crosspool.server.state import ServerState
from crosspool.server.tenant import tenant


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        arrival = asyncio.get_running_loop().time()
        submissions = await generation.prepared(
            state, request, _prepare(state, body, tenant(request, body.cache_salt))
        )
        deltas = generation.run(state, submissions, arrival)
        if body.stream:
            first = await generation.begin(request, deltas)
            chunks = _Chunks(submissions, with_usage=body.include_usage)
            return sse.EventStream(chunks, first, deltas)
        collecting = generation.collect(deltas, sum(len(one.requests) for one in submissions))
        return json_response(_whole(submissions, await generation.unless_disconnected(request, collecting)))

    return routes


async def _prepare(state: ServerState, body: CompletionRequest, owner: bytes) -> list[Submission]:
    """One submission per prompt, all checked before the first is run."""
    limits = state.config.limits
    prompts, params = body.prompts(limits.max_prompts), body.sampling()
    generation.check_choices(limits, len(prompts), params.n)
    llm = state.llm
    return [await llm.prepare(prompt, params, model=body.model, tenant=owner) for prompt in prompts]


def _whole(submissions: Sequence[Submission], choices: Sequence[generation.Choice]) -> Completion:
    return Completion(
        id=_new_id(),
        object="text_completion",
        created=int(time.time()),
        model=submissions[0].model.name,
        choices=[
            CompletionChoice(
                index=index,
                text="".join(choice.text),
                logprobs=None if choice.logprobs is None else completion_logprobs(choice.logprobs),
                finish_reason=str(choice.finish_reason),
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ],
        usage=generation.usage(submissions, choices),
    )


class _Chunks:
    """The events of one stream. With ``with_usage`` an event without choices comes last, and the others say
    that theirs is null."""

    def __init__(self, submissions: Sequence[Submission], *, with_usage: bool) -> None:
        self._submissions = submissions
        self._with_usage = with_usage
        self._id = _new_id()
        self._created = int(time.time())
        self._offsets: Counter[int] = Counter()
        self._last: dict[int, TextDelta] = {}
        self._texts: dict[int, sse.TextEvents] = {}

    def events(self, deltas: Sequence[TextDelta]) -> bytes:
        return b"".join(map(self._event_of, deltas))

    def last(self) -> bytes:
        if not self._with_usage:
            return b""
        return self._event(
            [], generation.usage(self._submissions, [self._last[index] for index in sorted(self._last)])
        )

    def _event_of(self, delta: TextDelta) -> bytes:
        """Nothing for a delta that has nothing to tell."""
        self._last[delta.index] = delta
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return b""
        if delta.logprobs is not None or delta.finish_reason is not None:
            return self._event([self._choice(delta)], None)
        if delta.index not in self._texts:
            example = self._event([self._choice(replace(delta, text=""))], None)
            self._texts[delta.index] = sse.TextEvents(example)
        return self._texts[delta.index].event(delta.text)

    def _choice(self, delta: TextDelta) -> CompletionChoice:
        logprobs = None
        if delta.logprobs is not None:
            logprobs = completion_logprobs(delta.logprobs, self._offsets[delta.index])
            self._offsets[delta.index] += sum(
                characters_begun(token.chosen.bytes) for token in delta.logprobs
            )
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=logprobs,
            finish_reason=None if delta.finish_reason is None else str(delta.finish_reason),
            stop_reason=delta.stop_reason,
        )

    def _event(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        chunk = Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._submissions[0].model.name,
            choices=choices,
        )
        if self._with_usage:
            chunk.usage = usage
        return sse.event(chunk)


def _new_id() -> str:
    return f"cmpl-{uuid4().hex}"
