"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from crosspool.llm import Submission, TextDelta
from crosspool.server import generation, sse
from crosspool.server.logprobs import chat_logprobs
from crosspool.server.openai_requests import ChatRequest
from crosspool.server.openai_responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    Usage,
    json_response,
)
from crosspool.server.state import ServerState
from crosspool.server.tenant import tenant


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        arrival = asyncio.get_running_loop().time()
        submission = await generation.prepared(
            state, request, _prepare(state, body, tenant(request, body.cache_salt))
        )
        deltas = generation.run(state, [submission], arrival)
        if body.stream:
            first = await generation.begin(request, deltas)
            chunks = _Chunks(submission, with_usage=body.include_usage)
            return sse.EventStream(chunks, first, deltas)
        collecting = generation.collect(deltas, len(submission.requests))
        return json_response(_whole(submission, await generation.unless_disconnected(request, collecting)))

    return routes


async def _prepare(state: ServerState, body: ChatRequest, owner: bytes) -> Submission:
    params = body.sampling()
    generation.check_choices(state.config.limits, 1, params.n)
    return await state.llm.prepare_chat(
        body.messages,
        params,
        model=body.model,
        chat_template_kwargs=body.chat_template_kwargs,
        tenant=owner,
    )


def _whole(submission: Submission, choices: Sequence[generation.Choice]) -> ChatCompletion:
    return ChatCompletion(
        id=_new_id(),
        object="chat.completion",
        created=int(time.time()),
        model=submission.model.name,
        choices=[
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content="".join(choice.text)),
                logprobs=None if choice.logprobs is None else chat_logprobs(choice.logprobs),
                finish_reason=str(choice.finish_reason),
                stop_reason=choice.stop_reason,
            )
            for index, choice in enumerate(choices)
        ],
        usage=generation.usage([submission], choices),
    )


class _Chunks:
    """The events of one stream: a choice's first chunk has its role, its last a finish reason.

    With ``with_usage`` a chunk without choices comes last, and the others say that theirs is null.
    """

    def __init__(self, submission: Submission, *, with_usage: bool) -> None:
        self._submission = submission
        self._with_usage = with_usage
        self._id = _new_id()
        self._created = int(time.time())
        self._last: dict[int, TextDelta] = {}
        self._texts: dict[int, sse.TextEvents] = {}

    def events(self, deltas: Sequence[TextDelta]) -> bytes:
        return b"".join(event for delta in deltas for event in self._events_of(delta))

    def last(self) -> bytes:
        if not self._with_usage:
            return b""
        return self._event(
            [], generation.usage([self._submission], [self._last[index] for index in sorted(self._last)])
        )

    def _events_of(self, delta: TextDelta) -> Iterator[bytes]:
        index = delta.index
        if index not in self._last:
            yield self._chunk(index, ChatMessage(role="assistant", content=""))
            self._texts[index] = sse.TextEvents(self._chunk(index, ChatMessage(content="")))
        self._last[index] = delta
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return
        if delta.logprobs is None and delta.finish_reason is None:
            yield self._texts[index].event(delta.text)
        else:
            yield self._chunk(index, ChatMessage(content=delta.text), delta)

    def _chunk(self, index: int, message: ChatMessage, delta: TextDelta | None = None) -> bytes:
        choice = ChatChunkChoice(index=index, delta=message, logprobs=None, finish_reason=None)
        if delta is not None and delta.logprobs is not None:
            choice.logprobs = chat_logprobs(delta.logprobs)
        if delta is not None and delta.finish_reason is not None:
            choice.finish_reason = str(delta.finish_reason)
            choice.stop_reason = delta.stop_reason
        return self._event([choice], None)

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None) -> bytes:
        chunk = ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._submission.model.name,
            choices=choices,
        )
        if self._with_usage:
            chunk.usage = usage
        return sse.event(chunk)


def _new_id() -> str:
    return f"chatcmpl-{uuid4().hex}"
