from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from crosspool.core.config import EngineConfig
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.server import messages
from crosspool.server.channel import ApiChannel
from helpers_fake_engine import CRASHING_SEED, MOST_RUNNING
from helpers_polling import wait_until

pytestmark = pytest.mark.integration

Started = tuple[ApiChannel, subprocess.Popen[bytes]]


@asynccontextmanager
async def cell(command: tuple[str, ...], config: EngineConfig) -> AsyncIterator[Started]:
    channel = ApiChannel()
    process = subprocess.Popen([*command, "--socket", channel.path, "--parent", str(os.getpid())])
    try:
        channel.send(messages.Start(config))
        yield channel, process
    finally:
        process.kill()
        process.wait()
        channel.close()


async def next_event(channel: ApiChannel, kind: type) -> object:
    """The next event of a kind; others are passed over."""
    async with asyncio.timeout(60):
        while True:
            event = await channel.receive()
            if isinstance(event, kind):
                return event


async def tokens_until_end(channel: ApiChannel, request: int) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while True:
        event = await next_event(channel, messages.Outputs)
        for output in event.outputs:
            if output.request == request:
                tokens += output.token_ids
                if output.finish_reason is not None:
                    return tokens, output.finish_reason


def request(number: int, *, max_tokens: int = 4, seed: int = 0, model: int = 0) -> Request:
    return Request(
        id=RequestId(number),
        model=ModelIndex(model),
        prompt_token_ids=(5, 6, 7),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=frozenset(),
        arrival=Nanoseconds(0),
    )


async def test_a_cell_loads_serves_and_shuts_down(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with cell(fake_cell_command, fake_config) as (channel, process):
        progress = await next_event(channel, messages.Progress)
        assert progress.progress.model == "tiny"
        ready = await next_event(channel, messages.Ready)
        assert [model.name for model in ready.info.models] == ["tiny", "other", "broken"]
        channel.send(messages.Submit(request(1)))
        assert await tokens_until_end(channel, 1) == ([5, 6, 7, 5], FinishReason.LENGTH)
        channel.send(messages.Shutdown())
        assert await asyncio.to_thread(process.wait, 30) == 0


async def test_a_cell_answers_finish_abort_and_stats(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with cell(fake_cell_command, fake_config) as (channel, _):
        await next_event(channel, messages.Ready)
        channel.send(messages.Submit(request(1, max_tokens=500)))
        await next_event(channel, messages.Outputs)
        channel.send(messages.Finish(RequestId(1), 1))
        assert (await tokens_until_end(channel, 1))[1] is FinishReason.STOP
        channel.send(messages.Submit(request(2, max_tokens=500)))
        channel.send(messages.Abort(RequestId(2)))
        assert (await tokens_until_end(channel, 2))[1] is FinishReason.ABORT
        channel.send(messages.StatsQuery(42))
        stats = await next_event(channel, messages.Stats)
        assert stats.query == 42
        assert stats.stats.models[0].finished == {"stop": 1, "length": 0, "abort": 1, "error": 0}


async def test_rejections_name_the_request_and_the_kind(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with cell(fake_cell_command, fake_config) as (channel, _):
        await next_event(channel, messages.Ready)
        channel.send(messages.Submit(request(9, model=2)))
        rejected = await next_event(channel, messages.Rejected)
        assert (rejected.request, rejected.kind) == (9, "ModelUnavailableError")
        assert "failed to load" in rejected.message
        for number in range(MOST_RUNNING + 1):
            channel.send(messages.Submit(request(number, max_tokens=800)))
        rejected = await next_event(channel, messages.Rejected)
        assert (rejected.request, rejected.kind) == (MOST_RUNNING, "OverloadedError")


async def test_a_broken_engine_says_so_and_exits(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    async with cell(fake_cell_command, fake_config) as (channel, process):
        await next_event(channel, messages.Ready)
        channel.send(messages.Submit(request(1, seed=CRASHING_SEED)))
        failed = await next_event(channel, messages.Failed)
        assert failed.kind == "EngineDeadError"
        assert "asked to crash" in failed.message
        assert await asyncio.to_thread(process.wait, 30) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_terminals_signals_do_not_end_a_cell(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig, number: signal.Signals
) -> None:
    async with cell(fake_cell_command, fake_config) as (channel, process):
        await next_event(channel, messages.Ready)
        channel.send(messages.Submit(request(1, max_tokens=20)))
        await next_event(channel, messages.Outputs)
        process.send_signal(number)
        assert (await tokens_until_end(channel, 1))[1] is FinishReason.LENGTH
        assert process.poll() is None


async def test_a_cell_ends_with_its_parent(
    fake_cell_command: tuple[str, ...], fake_config: EngineConfig
) -> None:
    """The parent here is a process that starts the cell and is then killed."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "from crosspool.server.channel import ApiChannel\n"
            "channel = ApiChannel()\n"
            "options = ['--socket', channel.path, '--parent', str(os.getpid())]\n"
            "print(subprocess.Popen([*sys.argv[1:], *options]).pid, channel.path, flush=True)\n"
            "time.sleep(600)\n",
            *fake_cell_command,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        number, path = parent.stdout.readline().split()
        child = psutil.Process(int(number))
        await wait_until(Path(f"{path}.commands").exists, "the cell does not listen", seconds=30)
        assert not is_gone(child)
        parent.kill()
        await wait_until(lambda: is_gone(child), "the cell outlives its parent", seconds=20)
        assert not Path(path).parent.exists()


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_cell_whose_parent_went_while_it_started_leaves_nothing(
    fake_cell_command: tuple[str, ...], tmp_path: Path
) -> None:
    """Whoever saw that the parent was gone has removed the pipes by then, but not their folder yet."""
    folder = tmp_path / "crosspool-pipes"
    folder.mkdir()
    options = ["--socket", str(folder / "cell"), "--parent", str(os.getpid())]
    ended = subprocess.run([*fake_cell_command, *options], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"")
    assert not folder.exists()
