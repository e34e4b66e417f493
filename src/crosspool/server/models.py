"""GET /v1/models: the models that serve."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import Response

from crosspool.core.info import ModelInfo
from crosspool.server.openai_responses import ModelCard, ModelList, json_response
from crosspool.server.state import ServerState

OWNER = "crosspool"


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()
    created = int(time.time())

    def card(model: ModelInfo) -> ModelCard:
        longest = model.longest
        return ModelCard(
            id=model.name, object="model", created=created, owned_by=OWNER, max_model_len=longest
        )

    @routes.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        serving = [model for model in state.llm.models if model.error is None]
        return json_response(ModelList(object="list", data=[card(model) for model in serving]))

    @routes.get("/v1/models/{name:path}", response_model=ModelCard)
    async def get_model(name: str) -> Response:
        return json_response(card(state.llm.front(name).model))

    return routes
