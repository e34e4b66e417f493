"""Nobody starves: who has waited too long is passed by few, and those few come through meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from crosspool.core.config import SchedulerConfig
from crosspool.core.ids import Nanoseconds, RequestId
from crosspool.pools.quotas import Quota
from crosspool.scheduler.admission import Admission
from crosspool.scheduler.sequence import Sequence
from helpers_control_plane import MILLISECOND, World, make_request, make_world
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token
"""Holds 16 tokens: a sequence takes one page for each 16 tokens."""
PART = 4


def watch_admission(world: World, look: Callable[[list[Sequence], Nanoseconds], None]) -> None:
    """Call ``look`` with those who have started, after every pass of admission."""
    admission: Admission = world.engine._scheduler._admission
    admit = admission.admit

    def watched(running: list[Sequence], now: Nanoseconds) -> list[Sequence]:
        started = admit(running, now)
        look(started, now)
        return started

    admission.admit = watched  # type: ignore[method-assign]


def aged_heads(world: World, now: Nanoseconds) -> list[Sequence]:
    """Heads of line that have waited over four times their target."""
    heads = [line[0] for line in world.engine._scheduler._admission._lines.values() if line]
    return [head for head in heads if now - head.request.arrival > PART * (head.due - head.request.arrival)]


def pages_of(sequence: Sequence) -> int:
    """Of its known tokens and the next one."""
    return -(-(sequence.known + 1) // 16)


@pytest.mark.parametrize("seed", range(60))
def test_a_large_request_comes_through_a_stream_of_small_ones(seed: int) -> None:
    rng = random.Random(seed)
    config = SchedulerConfig(
        chunk_quantum=16,
        max_chunk_tokens=32,
        decode_steps=rng.choice((1, 4, 16)),
        ttft_target=Nanoseconds(rng.choice((1, 2)) * MILLISECOND),
        outgrowth_risk=rng.choice((1.0, 0.5, 0.01)),
    )
    world = make_world([SPEC] * 3, page_bytes=PAGE, pages=20, scheduler=config)
    since: dict[RequestId, Nanoseconds] = {}
    passed = 0

    def look(started: list[Sequence], now: Nanoseconds) -> None:
        """Those who passed an aged head hold together at most a quarter of what it needs when one starts."""
        nonlocal passed
        since.update((sequence.request.id, now) for sequence in started)
        for head in aged_heads(world, now):
            if not any(sequence.order > head.order for sequence in started):
                continue
            aged_at = head.request.arrival + PART * (head.due - head.request.arrival)
            running = [s for s in world.engine._scheduler._running if since[s.request.id] > aged_at]
            assert sum(pages_of(s) for s in running) <= pages_of(head) // PART
            passed += 1

    watch_admission(world, look)
    small = iter(range(1, 1_000_000))

    def add_small() -> None:
        prompt = tuple(range(rng.randint(1, 30)))
        world.add(make_request(next(small), prompt, rng.randint(10, 60), model=rng.randint(1, 2)))

    for _ in range(12):
        add_small()
    world.step()
    world.add(make_request(0, tuple(range(97)) * 3, 10))
    for _ in range(6000):
        if RequestId(0) in world.finished:
            break
        world.step()
        while sum(model.running + model.waiting for model in world.engine.stats().models[1:]) < 12:
            add_small()
        world.executor.advance()
    assert RequestId(0) in world.finished, f"{len(world.finished)} small ones came through before"
    assert passed or seed


def world_of_a_waiting_head(quotas: list[Quota] | None = None) -> World:
    """A long output of model 0 holds 23 of 40 pages and more; a prompt of model 1 that needs 32 has aged."""
    config = SchedulerConfig(ttft_target=Nanoseconds(MILLISECOND), decode_steps=4, outgrowth_risk=1.0)
    world = make_world([SPEC] * 4, page_bytes=PAGE, pages=40, scheduler=config, quotas=quotas)
    world.add(make_request(0, tuple(range(350)), 150, model=0))
    while not world.outputs[RequestId(0)]:
        world.step()
        world.executor.advance()
    world.add(make_request(1, tuple(range(500)), 10, model=1))
    while not aged_heads(world, world.clock.now()):
        world.step()
        world.executor.advance()
    return world


def run_until(world: World, request: int) -> None:
    while RequestId(request) not in world.finished:
        world.step()
        world.executor.advance()


def test_small_requests_come_through_while_an_aged_head_waits_for_pages() -> None:
    world = world_of_a_waiting_head()
    world.add(make_request(2, (1, 2, 3), 8, model=2))
    run_until(world, 2)
    assert len(world.outputs[RequestId(0)]) < 100, "it waited for the one who runs"
    assert not world.outputs[RequestId(1)]
    world.run()
    assert len(world.outputs[RequestId(1)]) == 10


def test_no_more_of_them_than_a_quarter_of_what_it_lacks() -> None:
    world = world_of_a_waiting_head()
    for number in range(2, 12):
        world.add(make_request(number, (number, 2, 3), 12, model=2))
    most = 0
    while not world.outputs[RequestId(1)]:
        world.step()
        world.executor.advance()
        models = world.engine.stats().models
        lacking = 32 - (40 - models[0].kv_pages_held - 1)
        assert not models[2].running or models[2].running <= lacking // PART
        most = max(most, models[2].running)
    assert most >= 3


def test_a_request_that_is_not_small_waits_behind_it() -> None:
    world = world_of_a_waiting_head()
    world.add(make_request(2, tuple(range(120)), 8, model=2))
    run_until(world, 1)
    assert not world.outputs[RequestId(2)]
    world.run()


def test_what_is_below_a_floor_is_no_matter_of_the_head() -> None:
    world = world_of_a_waiting_head([Quota(), Quota(), Quota(floor=8), Quota()])
    world.add(make_request(2, tuple(range(120)), 4, model=2))
    run_until(world, 2)
    assert not world.outputs[RequestId(1)]
    world.run()
