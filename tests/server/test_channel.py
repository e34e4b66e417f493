from __future__ import annotations

import asyncio
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crosspool.core.errors import ConfigError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.request import EngineOutput, Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.token_record import TOKEN_RECORD
from crosspool.server import messages
from crosspool.server.channel import ApiChannel, CellChannel

pytestmark = pytest.mark.integration

Channels = tuple[ApiChannel, CellChannel]


@pytest.fixture
def channels() -> Iterator[Channels]:
    api = ApiChannel()
    cell = CellChannel(api.path)
    yield api, cell
    # In a cell a thread is blocked in receive() and the way in is open for as long as the process lives.
    os.close(cell._commands)
    cell.close()
    api.close()


def failed(text: str) -> messages.Failed:
    return messages.Failed("x", text)


def request(prompt: tuple[int, ...]) -> Request:
    return Request(
        RequestId(1), ModelIndex(0), prompt, SamplingParams(), 4, 0, frozenset(), arrival=Nanoseconds(0)
    )


def write_token(cell: CellChannel, request: int, token: int) -> None:
    """As a team does."""
    assert os.write(cell.tokens, struct.pack("=3q", TOKEN_RECORD, request, token)) == 24


async def test_messages_go_both_ways_in_order(channels: Channels) -> None:
    api, cell = channels
    commands = [messages.Abort(RequestId(number)) for number in range(3000)]
    for command in commands:
        api.send(command)
    assert [await asyncio.to_thread(cell.receive) for _ in commands] == commands
    events = [failed(str(number)) for number in range(3000)]
    for event in events:
        cell.send(event)
    async with asyncio.timeout(60):
        assert [await api.receive() for _ in events] == events


async def test_what_a_pipe_cannot_hold_arrives_whole_too(channels: Channels) -> None:
    """Commands wait for room without anybody waiting for them; events are waited for."""
    api, cell = channels
    commands = [messages.Submit(request(tuple(range(number, 400_000)))) for number in range(3)]
    for command in commands:
        api.send(command)
    async with asyncio.timeout(60):
        assert [await asyncio.to_thread(cell.receive) for _ in commands] == commands
    events = [failed(str(number) * 1_500_000) for number in range(3)]
    sent = [asyncio.create_task(asyncio.to_thread(cell.send, event)) for event in events]
    async with asyncio.timeout(60):
        arrived = [await api.receive() for _ in events]
        await asyncio.gather(*sent)
    assert sorted(event.message for event in arrived) == [event.message for event in events]


async def test_tokens_and_messages_keep_their_order(channels: Channels) -> None:
    api, cell = channels
    write_token(cell, 7, 1)
    write_token(cell, 8, 2**40)
    cell.send(failed("in between"))
    write_token(cell, 7, 3)
    expected = [
        messages.Outputs((EngineOutput(RequestId(7), (1,)), EngineOutput(RequestId(8), (2**40,)))),
        failed("in between"),
        messages.Outputs((EngineOutput(RequestId(7), (3,)),)),
    ]
    async with asyncio.timeout(30):
        assert [await api.receive() for _ in expected] == expected


async def test_tokens_may_come_between_the_pieces_of_a_message(channels: Channels) -> None:
    api, cell = channels
    write = cell._write

    def write_and_interrupt(frame: bytes) -> None:
        write(frame)
        write_token(cell, 7, 1)

    cell._write = write_and_interrupt  # type: ignore[method-assign]
    cell.send(failed("x" * 10_000))
    tokens = messages.Outputs((EngineOutput(RequestId(7), (1,)),))
    async with asyncio.timeout(30):
        first, *others = [await api.receive() for _ in range(3)]
    assert first == messages.Outputs(tokens.outputs * 2)
    assert others == [failed("x" * 10_000), tokens]


async def test_the_last_event_arrives_though_the_cell_closes_at_once() -> None:
    api = ApiChannel()
    cell = CellChannel(api.path)
    events = [failed("last words" * number) for number in range(100)]
    for event in events:
        cell.send(event)
    cell.close()
    async with asyncio.timeout(30):
        assert [await api.receive() for _ in events] == events
    api.close()
    with pytest.raises(EOFError):
        cell.receive()
    os.close(cell._commands)


async def test_what_nobody_is_left_to_read_is_dropped() -> None:
    api = ApiChannel()
    cell = CellChannel(api.path)
    api.close()
    cell.send(failed("unheard"))
    os.close(cell._commands)
    cell.close()


async def test_the_pipes_are_in_a_private_folder_that_goes_away() -> None:
    api = ApiChannel()
    folder = Path(api.path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 2
    api.close()
    assert not folder.exists()


async def test_a_folder_that_cannot_hold_pipes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "mkfifo", refuse)
    with pytest.raises(ConfigError, match=r"no pipe can be made as .*: Operation not permitted"):
        ApiChannel()
    assert list(tmp_path.iterdir()) == []
