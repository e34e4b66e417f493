from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from crosspool.core.config import EngineConfig, ModelConfig
from crosspool.core.errors import ConfigError, EngineDeadError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import EngineInfo, LoadProgress
from crosspool.core.request import Request
from crosspool.core.sampling import SamplingParams
from crosspool.server.config import SupervisionConfig
from crosspool.server.remote_engine import RemoteEngine
from crosspool.server.supervisor import EngineState, Supervisor
from helpers_fake_engine import CRASHING_SEED, UNUSABLE_FOLDER
from helpers_polling import wait_until

pytestmark = pytest.mark.integration


@dataclass
class Supervised:
    engine: RemoteEngine
    supervisor: Supervisor
    task: asyncio.Task[None]
    front_opens: asyncio.Event
    progress: list[LoadProgress] = field(default_factory=list)
    ready: list[EngineInfo] = field(default_factory=list)

    async def until_ready(self, times: int = 1, seconds: float = 30) -> None:
        await wait_until(lambda: len(self.ready) >= times or self.task.done(), "not ready", seconds)
        assert len(self.ready) >= times

    async def until(self, state: EngineState, seconds: float) -> None:
        await wait_until(lambda: self.supervisor.state is state, f"not {state}", seconds)


@asynccontextmanager
async def supervised(
    command: tuple[str, ...], config: EngineConfig, limits: SupervisionConfig | None = None
) -> AsyncIterator[Supervised]:
    engine, progress, ready = RemoteEngine(), [], []

    front_opens = asyncio.Event()
    front_opens.set()

    async def on_ready() -> None:
        ready.append(engine.info)
        await front_opens.wait()

    supervisor = Supervisor(
        engine,
        config,
        limits or SupervisionConfig(),
        progress=progress.append,
        on_ready=on_ready,
        cell_command=command,
    )
    task = asyncio.create_task(supervisor.run())
    try:
        yield Supervised(engine, supervisor, task, front_opens, progress, ready)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert cells() == []


def cells() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "--socket" in child.cmdline()]


def cell() -> psutil.Process:
    (process,) = cells()
    return process


def request(number: int, *, max_tokens: int = 800, seed: int = 0) -> Request:
    return Request(
        id=RequestId(number),
        model=ModelIndex(0),
        prompt_token_ids=(5, 6, 7),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=frozenset(),
        arrival=Nanoseconds(0),
    )


async def drain(engine: RemoteEngine, wanted: Request) -> int:
    """How many tokens a request gets."""
    return sum([len(output.token_ids) async for output in engine.generate(wanted)])


async def test_progress_and_readiness_are_reported_and_requests_served(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with supervised(fake_cell_command, fake_config) as running:
        assert running.supervisor.state is EngineState.LOADING
        await running.until_ready()
        assert running.supervisor.state is EngineState.READY
        assert [update.model for update in running.progress] == ["tiny"] * 2 + ["other"] * 2 + ["broken"] * 2
        assert "truncated" in running.progress[-1].error
        assert await drain(running.engine, request(1, max_tokens=7)) == 7


async def test_an_engine_is_ready_when_the_front_is(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with supervised(fake_cell_command, fake_config) as running:
        await running.until_ready()
        running.front_opens.clear()
        cell().kill()
        await running.until_ready(times=2)
        assert running.supervisor.state is EngineState.RESTARTING
        running.front_opens.set()
        await running.until(EngineState.READY, seconds=5)


async def test_a_killed_cells_streams_end_within_2_s_and_another_is_started(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with supervised(fake_cell_command, fake_config) as running:
        await running.until_ready()
        first = cell()
        async with aclosing(running.engine.generate(request(1))) as stream:
            await anext(stream)
            first.send_signal(signal.SIGKILL)
            async with asyncio.timeout(2):
                with pytest.raises(EngineDeadError):
                    while True:
                        await anext(stream)
        await running.until(EngineState.RESTARTING, seconds=2)
        await wait_until(lambda: cells() and cell().pid != first.pid, "no restart", seconds=10)
        await running.until_ready(times=2)
        assert await drain(running.engine, request(2, max_tokens=7)) == 7


async def test_an_engine_that_breaks_down_is_replaced(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with supervised(fake_cell_command, fake_config) as running:
        await running.until_ready()
        with pytest.raises(EngineDeadError) as raised:
            await drain(running.engine, request(1, seed=CRASHING_SEED))
        assert running.supervisor.state is EngineState.RESTARTING
        assert "secret" not in str(raised.value)
        await running.until_ready(times=2)


async def test_a_cell_that_hangs_is_killed_and_replaced(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with supervised(fake_cell_command, fake_config, SupervisionConfig(hang_timeout=1.5)) as running:
        await running.until_ready()
        hung = cell()
        hung.suspend()
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(drain(running.engine, request(1)), 30)
        assert running.supervisor.state is EngineState.RESTARTING
        await running.until_ready(times=2)
        assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE


async def test_a_cell_that_stays_silent_while_loading_is_killed(fake_config: EngineConfig) -> None:
    silent = (sys.executable, "-c", "import time; time.sleep(600)")
    limits = SupervisionConfig(hang_timeout=0.5, load_timeout=1.0)
    async with supervised(silent, fake_config, limits) as running:
        with pytest.raises(EngineDeadError, match="no progress in loading"):
            await asyncio.wait_for(running.task, 30)


async def test_an_unusable_configuration_ends_the_supervisor_with_the_reason(
    fake_cell_command: tuple[str, ...], tokenizer_folder: Path
) -> None:
    config = EngineConfig(models=(ModelConfig("a", str(tokenizer_folder / UNUSABLE_FOLDER)),))
    async with supervised(fake_cell_command, config) as running:
        with pytest.raises(ConfigError, match="the pools do not fit"):
            await asyncio.wait_for(running.task, 30)


async def test_a_cell_that_dies_while_loading_ends_the_supervisor_with_the_signal(
    fake_config: EngineConfig,
) -> None:
    dying = (sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    async with supervised(dying, fake_config) as running:
        with pytest.raises(EngineDeadError, match="signal 11"):
            await asyncio.wait_for(running.task, 30)


async def test_a_cell_that_keeps_dying_counts_as_dead_but_is_still_started(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    limits = SupervisionConfig(dead_after=2, max_restart_delay=0.5)
    async with supervised(fake_cell_command, fake_config, limits) as running:
        for times in (1, 2):
            await running.until_ready(times)
            cell().kill()
            await wait_until(lambda: running.supervisor.state is not EngineState.READY, "still ready", 5)
        assert running.supervisor.state is EngineState.DEAD
        await running.until_ready(times=3)
        assert running.supervisor.state is EngineState.READY


async def test_the_pause_before_a_restart_grows_but_not_beyond_its_limit(fake_config: EngineConfig) -> None:
    limits = SupervisionConfig(max_restart_delay=8)
    supervisor = Supervisor(
        RemoteEngine(), fake_config, limits, progress=lambda _: None, on_ready=lambda: asyncio.sleep(0)
    )
    delays = [supervisor._note_death() for _ in range(2000)]
    assert delays[:5] == [0.5, 1, 2, 4, 8]
    assert set(delays[5:]) == {8}
