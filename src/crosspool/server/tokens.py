"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from crosspool.core.errors import InvalidRequestError
from crosspool.server import generation
from crosspool.server.openai_requests import DetokenizeRequest, TokenizeRequest
from crosspool.server.openai_responses import Detokenized, Tokenized, json_response
from crosspool.server.state import ServerState
from crosspool.text.front import ModelFront


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        work = state.llm.with_front(body.model, lambda front: _tokenized(front, body))
        return json_response(await generation.prepared(state, request, work))

    @routes.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        work = state.llm.with_front(body.model, lambda front: front.detokenize(body.tokens))
        return json_response(Detokenized(prompt=await generation.prepared(state, request, work)))

    return routes


def _tokenized(front: ModelFront, body: TokenizeRequest) -> Tokenized:
    tokens = _tokens(front, body)
    tokenizer = front.tokenizer
    texts = None
    if body.return_token_strs and tokenizer is not None:
        texts = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
    return Tokenized(
        count=len(tokens),
        max_model_len=front.model.longest,
        tokens=list(tokens),
        token_strs=texts,
    )


def _tokens(front: ModelFront, body: TokenizeRequest) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", parameter="prompt")
    if body.messages is not None:
        return front.chat_tokens(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            variables=body.chat_template_kwargs,
        )
    return front.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
