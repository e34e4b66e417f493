"""Nobody starves: who has waited too long lets nobody pass whose pages it could have."""

from __future__ import annotations

import random

import pytest

from crosspool.core.config import SchedulerConfig
from crosspool.core.ids import Nanoseconds, RequestId
from crosspool.scheduler.admission import Admission
from crosspool.scheduler.sequence import Sequence
from helpers_control_plane import MILLISECOND, World, make_request, make_world
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token


def watch_passing(world: World, aged_after: int) -> list[tuple[Sequence, Sequence]]:
    """Pairs of who started and an aged head of another line that it passed."""
    passed: list[tuple[Sequence, Sequence]] = []
    admission: Admission = world.engine._scheduler._admission
    admit = admission.admit

    def watched(running: list[Sequence], now: Nanoseconds) -> list[Sequence]:
        started = admit(running, now)
        heads = [line[0] for line in admission._lines.values() if line]
        for head in heads:
            patience = aged_after * (head.due - head.request.arrival)
            if now > head.request.arrival + patience:
                passed.extend((s, head) for s in started if s.order > head.order)
        return started

    admission.admit = watched  # type: ignore[method-assign]
    return passed


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
    passed = watch_passing(world, aged_after=4)
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
    assert not passed
