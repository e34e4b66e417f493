from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import helpers_fake_engine
from crosspool.core.config import EngineConfig, ModelConfig
from crosspool.engine.async_engine import AsyncEngine
from crosspool.llm import AsyncLLM
from crosspool.metrics.prometheus import Exposition
from crosspool.server.app import create_app
from crosspool.server.config import ServerConfig
from crosspool.server.limits import Admission
from crosspool.server.state import ServerState
from crosspool.server.supervisor import EngineState
from helpers_tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer and nothing else, which is all that a fake engine needs."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def fake_config(tokenizer_folder: Path) -> EngineConfig:
    """Two models that serve, whose tokenizers differ in adding BOS, and one that does not load."""
    other = tokenizer_folder.parent / "other"
    save_tiny_tokenizer(other, add_bos_token=True)
    return EngineConfig(
        models=(
            ModelConfig("tiny", str(tokenizer_folder)),
            ModelConfig("other", str(other)),
            ModelConfig("broken", str(tokenizer_folder.parent / helpers_fake_engine.BROKEN_FOLDER)),
        )
    )


@pytest.fixture(scope="session")
def fake_cell_command() -> tuple[str, ...]:
    return (sys.executable, helpers_fake_engine.__file__)


@dataclass
class Application:
    """The application over a fake engine, in this process."""

    client: httpx.AsyncClient
    state: ServerState
    engine: helpers_fake_engine.FakeEngine

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.client.post(path, json=body)


@pytest.fixture
async def start_application(
    fake_config: EngineConfig,
) -> AsyncIterator[Callable[[ServerConfig], Application]]:
    opened: list[Application] = []

    async def start(config: ServerConfig) -> Application:
        engine = helpers_fake_engine.FakeEngine(fake_config)
        state = ServerState(
            config=config,
            engine_state=lambda: EngineState.READY,
            metrics=Exposition(),
            admission=Admission(config.limits),
            open_llm=await AsyncLLM.open(AsyncEngine(engine)),
        )
        transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
        opened.append(Application(client, state, engine))
        return opened[-1]

    yield start
    for application in opened:
        await application.client.aclose()
        if application.state.open_llm is not None:
            await application.state.open_llm.close()


@pytest.fixture
async def application(start_application: Callable[[ServerConfig], Application]) -> Application:
    return await start_application(ServerConfig())
