"""The simulator's executor keeps the executors' contract and repeats itself exactly."""

from __future__ import annotations

import random

import pytest

from crosspool.core.batch import RetiredEvent, TokenEvent
from crosspool.core.errors import InvariantError
from crosspool.core.ids import RequestId
from crosspool.sim.clock import VirtualClock
from helpers_control_plane import World, make_request, make_world
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token


def replay(seed: int) -> World:
    rng = random.Random(seed)
    world = make_world([SPEC, mla_spec()], page_bytes=PAGE, pages=30, speed=lambda: rng.uniform(0.5, 2))
    for identity in range(6):
        world.add(make_request(identity, tuple(range(5 + identity)), 20, model=identity % 2))
    world.run()
    return world


def test_the_same_seed_gives_the_same_times() -> None:
    assert replay(3).token_times == replay(3).token_times
    assert replay(3).token_times != replay(4).token_times
    assert replay(3).outputs == replay(4).outputs


def test_tokens_come_before_the_one_retired_event_of_their_grant() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=30)
    world.add(make_request(0, (1, 2, 3), 70))
    retired: set[int] = set()
    while world.engine.has_work():
        events = world.executor.poll()
        for event in events:
            if isinstance(event, TokenEvent):
                assert event.grant not in retired
            elif isinstance(event, RetiredEvent):
                assert event.grant not in retired and min(event.layer_times) > 0
                retired.add(event.grant)
        world.executor._events = events
        world.step()
        world.executor.advance()
    assert len(retired) >= 3


def test_wait_passes_time_to_the_next_end_or_the_limit() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=30)
    world.executor.wait(0.5)
    assert world.clock.now() == 500_000_000
    world.add(make_request(0, (1, 2, 3), 1))
    world.step()
    end = world.executor.next_end
    world.executor.wait(0.5)
    assert world.clock.now() == end
    world.executor.close()
    assert not world.executor.advance()


def test_a_cancelled_request_says_nothing_more() -> None:
    world = make_world([SPEC], page_bytes=PAGE, pages=30)
    world.add(make_request(0, (1, 2, 3), 50))
    while len(world.outputs[RequestId(0)]) < 3:
        world.step()
        world.executor.advance()
    before = list(world.outputs[RequestId(0)])
    world.engine.abort(RequestId(0))
    world.run()
    assert world.outputs[RequestId(0)] == before


def test_time_does_not_go_back() -> None:
    clock = VirtualClock()
    clock.advance_to(5)
    with pytest.raises(InvariantError, match="from 5 to 4"):
        clock.advance_to(4)
