"""The application: routes, error shapes, gate one, the API key and the count of errors."""

from __future__ import annotations

from fastapi import FastAPI

from crosspool import __version__
from crosspool.server import chat, completions, errors, health, models, tokens
from crosspool.server.auth import ApiKeyMiddleware
from crosspool.server.error_counter import ErrorCounterMiddleware
from crosspool.server.limits import GateMiddleware
from crosspool.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """An ASGI application over ``state``. The middleware added last sees a request first."""
    app = FastAPI(title="CrossPool", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app, state.config.limits.retry_after)
    for subject in (chat, completions, models, tokens, health):
        app.include_router(subject.router(state))
    app.add_middleware(GateMiddleware, admission=state.admission, limits=state.config.limits)
    if state.config.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=state.config.api_key)
    app.add_middleware(ErrorCounterMiddleware, counter=state.metrics.error_responses)
    return app
