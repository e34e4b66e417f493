"""Floors and caps of models, as the whole control plane keeps them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from crosspool.build.pool_plan import PoolPlan
from crosspool.core.config import EngineConfig, ModelConfig, SchedulerConfig
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import ConfigError, RequestTooLargeError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.kv_layout import make_layout
from crosspool.pools.quotas import Quota
from crosspool.scheduler.sequence import State
from crosspool.sim.fluid import Rates
from crosspool.sim.replay import RequestRecord, replay
from crosspool.sim.workload import Trace
from helpers_control_plane import MILLISECOND, World, make_request, make_world
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)
PAGE = 16 * SPEC.kv_bytes_per_token  # one group, 16 tokens
SMALL = SchedulerConfig(chunk_quantum=16, max_chunk_tokens=32, decode_steps=4)
# What a model learns of output lengths is part of what others expect: a gate of risk would not be a stranger.
NO_GATE = replace(SMALL, outgrowth_risk=1.0)


def two_models(pages: int, *quotas: Quota, scheduler: SchedulerConfig = NO_GATE) -> World:
    return make_world(
        [SPEC, SPEC],
        page_bytes=PAGE,
        pages=pages,
        quotas=list(quotas),
        scheduler=scheduler,
        prefix_cache=False,
    )


def serve(partition: bool, requests: list[tuple[float, int, int, int]]) -> list[RequestRecord]:
    """Replay (time, model, prompt, output) over a pool of 24 pages, of which each of two models has half."""
    specs = {ModelIndex(0): SPEC, ModelIndex(1): mla_spec()}
    share = {"kv_floor_bytes": 12 * PAGE, "kv_cap_bytes": 12 * PAGE} if partition else {}
    config = EngineConfig(tuple(ModelConfig(f"m{i}", "nowhere", **share) for i in specs), scheduler=NO_GATE)
    layouts = {index: make_layout(spec, PAGE) for index, spec in specs.items()}
    plan = PoolPlan(PAGE, DevicePages.of([24]), 1, layouts, {})
    columns = zip(*requests, strict=True)
    trace = Trace(
        *(np.array(column, kind) for column, kind in zip(columns, (float, int, int, int), strict=True))
    )
    return replay(trace, config, specs, plan, Rates(1000.0, Nanoseconds(50 * MILLISECOND))).records


def times_of(records: list[RequestRecord], model: int) -> list[object]:
    return [(r.first_token, r.last_token, r.waits, r.pauses) for r in records if r.model == model]


@pytest.mark.parametrize("seed", range(40))
def test_a_static_partition_makes_models_strangers_to_each_other(seed: int) -> None:
    rng = random.Random(seed)
    requests = sorted(
        (rng.uniform(0, 6), rng.randrange(2), rng.randint(1, 70), rng.randint(1, 50)) for _ in range(40)
    )
    together = serve(True, requests)
    assert any(record.waited for record in together)
    for model in (0, 1):
        alone = serve(True, [request for request in requests if request[1] == model])
        assert times_of(together, model) == times_of(alone, model)


def test_without_shares_models_wait_for_each_other() -> None:
    """What the test above would find if shares were not kept."""
    requests = [(0.0, 0, 150, 60), (0.01, 0, 150, 60), (0.5, 1, 120, 60)]
    assert times_of(serve(False, requests), 1) != times_of(serve(False, requests[2:]), 1)


def test_a_request_that_no_share_could_hold_is_refused_with_the_numbers() -> None:
    world = two_models(20, Quota(cap=4), Quota(floor=6))
    said = rf"40 prompt tokens and 30 to generate are 70 tokens.* which is 64 .*model-0.* {4 * PAGE:,} bytes"
    with pytest.raises(RequestTooLargeError, match=said):
        world.add(make_request(0, tuple(range(40)), 30))
    world.add(make_request(1, tuple(range(40)), 24))
    with pytest.raises(RequestTooLargeError, match="which is 320"):
        world.add(make_request(2, tuple(range(97)) * 3, 40, model=1))
    world.run()
    assert set(world.finished) == {RequestId(1)}


def test_a_floor_is_there_however_long_others_grow() -> None:
    world = two_models(10, Quota(), Quota(floor=3))
    for identity in range(4):
        world.add(make_request(identity, tuple(range(16)), 60))
    for _ in range(2000):
        world.step()
        world.engine.check()
        if sum(map(len, world.outputs.values())) > 80:
            break
        world.executor.advance()
    assert world.engine.stats().kv_pages_free <= 3
    world.add(make_request(9, tuple(range(40)), 1, model=1))
    world.step()
    assert world.state(RequestId(9)) is State.PREFILLING
    assert world.engine.stats().models[0].waiting >= 1
    world.run()


def test_who_waits_for_a_cap_of_its_own_holds_nobody_back_however_aged() -> None:
    targets = SchedulerConfig(
        chunk_quantum=16, max_chunk_tokens=32, decode_steps=4, ttft_target=Nanoseconds(MILLISECOND // 20)
    )
    world = two_models(20, Quota(cap=4), Quota(), scheduler=targets)
    world.add(make_request(0, tuple(range(16)), 48))
    world.add(make_request(1, tuple(range(60)), 2))
    world.step()
    assert world.state(RequestId(1)) is State.WAITING
    sequence = world.engine._scheduler.get(RequestId(1))
    assert sequence is not None
    while world.clock.now() < 10 * sequence.due:
        world.executor.advance()
        world.step()
    assert sequence.state is State.WAITING
    world.add(make_request(2, tuple(range(16)), 4, model=1))
    world.step()
    assert world.state(RequestId(2)) is State.PREFILLING
    world.run()


def test_shares_that_cannot_be_kept_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=rf"together are {12 * PAGE:,}, but they share {10 * PAGE:,} bytes"):
        two_models(10, Quota(floor=6), Quota(floor=6))
    with pytest.raises(ConfigError, match=r"model-1.* leave it 0 bytes .* needs 2,048"):
        two_models(10, Quota(floor=10), Quota())
    with pytest.raises(ConfigError, match=r"kv_cap_bytes 100 .* kv_floor_bytes 200"):
        ModelConfig("a", "nowhere", kv_floor_bytes=200, kv_cap_bytes=100)
    with pytest.raises(ConfigError, match="kv_floor_bytes must not be below 0"):
        ModelConfig("a", "nowhere", kv_floor_bytes=-1)
