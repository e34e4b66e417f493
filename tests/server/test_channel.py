from __future__ import annotations

import asyncio
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crosspool.core.errors import ConfigError
from crosspool.core.ids import RequestId
from crosspool.server import messages
from crosspool.server.channel import ApiChannel, CellChannel

pytestmark = pytest.mark.integration


@pytest.fixture
def channels() -> Iterator[tuple[ApiChannel, CellChannel]]:
    api = ApiChannel()
    cell = CellChannel(api.path)
    yield api, cell
    # In a cell this thread is blocked in receive() and the way in is open for as long as the process lives.
    context = cell._commands.context
    context.destroy(linger=0)
    api.close()


async def test_messages_go_both_ways_in_order(channels: tuple[ApiChannel, CellChannel]) -> None:
    api, cell = channels
    commands = [messages.Abort(RequestId(number)) for number in range(3000)]
    for command in commands:
        api.send(command)
    assert [await asyncio.to_thread(cell.receive) for _ in commands] == commands
    events = [messages.Failed("x", str(number)) for number in range(3000)]
    for event in events:
        cell.send(event)
    async with asyncio.timeout(60):
        assert [await api.receive() for _ in events] == events
    cell.close(linger=0)


async def test_the_last_event_arrives_though_the_cell_closes_at_once(
    channels: tuple[ApiChannel, CellChannel],
) -> None:
    api, cell = channels
    events = [messages.Failed("x", "last words" * number) for number in range(1000)]
    for event in events:
        cell.send(event)
    await asyncio.to_thread(cell.close, 5.0)
    async with asyncio.timeout(30):
        assert [await api.receive() for _ in events] == events


async def test_the_sockets_are_in_a_private_folder_that_goes_away() -> None:
    api = ApiChannel()
    folder = Path(api.path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 1
    api.close()
    assert not folder.exists()


async def test_a_folder_that_cannot_hold_sockets_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="no Unix socket can be made"):
        ApiChannel()
    assert list(long.iterdir()) == []
