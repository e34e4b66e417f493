from __future__ import annotations

import asyncio

import pytest

from crosspool.core.errors import OverloadedError
from crosspool.server.config import LimitsConfig
from crosspool.server.time_limits import in_time

pytestmark = pytest.mark.unit

FOR_EVER = 600.0


def clock() -> float:
    return asyncio.get_running_loop().time()


async def test_each_token_moves_the_limit_on() -> None:
    limits = LimitsConfig(first_token_timeout=FOR_EVER, token_timeout=0.02)
    async with in_time(limits, 1, clock()) as limit:
        limit.note(0, clock())
        limit.note(0, clock() + FOR_EVER)
        await asyncio.sleep(0.1)
    with pytest.raises(OverloadedError, match=r"next token did not come within 0\.02 s"):
        async with in_time(limits, 1, clock()) as limit:
            limit.note(0, clock())
            limit.note(0, clock() + 0.05)
            await asyncio.sleep(FOR_EVER)


async def test_the_first_limit_holds_until_every_choice_has_begun() -> None:
    limits = LimitsConfig(first_token_timeout=FOR_EVER, token_timeout=0.02)
    waited = False
    with pytest.raises(OverloadedError, match="next token"):
        async with in_time(limits, 2, clock()) as limit:
            limit.note(1, clock())
            limit.note(1, clock())
            await asyncio.sleep(0.1)
            waited = True
            limit.note(0, clock())
            await asyncio.sleep(FOR_EVER)
    assert waited


async def test_no_token_moves_the_limit_of_the_whole_request() -> None:
    limits = LimitsConfig(total_timeout=FOR_EVER)
    with pytest.raises(OverloadedError, match="longer than 600 s"):
        async with in_time(limits, 1, clock() - FOR_EVER + 0.05) as limit:
            limit.note(0, clock())
            await asyncio.sleep(FOR_EVER)


async def test_a_timeout_from_within_is_left_as_it_is() -> None:
    with pytest.raises(TimeoutError, match="from within"):
        async with in_time(LimitsConfig(), 1, clock()):
            raise TimeoutError("from within")
