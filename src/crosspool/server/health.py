"""GET /health, /ready, /metrics and /version: for those who run the server."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from crosspool import __version__
from crosspool.core.errors import EngineDeadError
from crosspool.core.info import EngineStats, ModelInfo
from crosspool.metrics.prometheus import CONTENT_TYPE
from crosspool.server.state import ServerState
from crosspool.server.supervisor import EngineState

STATS_TIMEOUT = 2.0


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """Live: this process answers, and the engine's lives or is being started again."""
        engine = state.engine_state()
        return JSONResponse({"engine": engine}, 503 if engine is EngineState.DEAD else 200)

    @routes.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        """Whether requests are served now, and what is known of each model."""
        content = {
            "ready": state.ready,
            "draining": state.admission.closed,
            "engine": state.engine_state(),
            "models": _models(state),
        }
        return JSONResponse(content, 200 if state.ready else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.render(await _stats(state)), media_type=CONTENT_TYPE)

    @routes.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    return routes


def _models(state: ServerState) -> list[dict[str, Any]]:
    """Before the engine is ready what loading has said so far, then what the engine says."""
    if state.open_llm is None:
        return [
            {
                "name": progress.model,
                "ready": False,
                "error": progress.error,
                "loaded_bytes": progress.done_bytes,
                "total_bytes": progress.total_bytes,
            }
            for progress in state.loading.values()
            if progress.unit == "bytes"
        ]
    return [_model(model, state.ready) for model in state.open_llm.models]


def _model(model: ModelInfo, ready: bool) -> dict[str, Any]:
    return {
        "name": model.name,
        "ready": ready and model.error is None,
        "error": model.error,
        "residency": model.residency,
        "attention_bytes": model.attention_bytes,
        "ffn_bytes": model.ffn_bytes,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "prefix_cache": model.prefix_cache,
        "max_model_len": model.longest,
    }


async def _stats(state: ServerState) -> EngineStats | None:
    """Figures of the engine, None while it has none to give."""
    try:
        return await asyncio.wait_for(state.llm.stats(), STATS_TIMEOUT)
    except (EngineDeadError, TimeoutError):
        return None
