"""A replay through the real control plane gives the times that can be counted by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from crosspool.build.pool_plan import PoolPlan
from crosspool.core.config import EngineConfig, ModelConfig, SchedulerConfig
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import ModelIndex, Nanoseconds
from crosspool.core.kv_layout import make_layout
from crosspool.scheduler.sequence import Wait
from crosspool.sim.fluid import Rates
from crosspool.sim.replay import ReplayResult, replay
from crosspool.sim.workload import Trace
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

SECOND = 1_000_000_000
RATES = Rates(1000.0, Nanoseconds(SECOND // 20))
SPECS = {ModelIndex(0): gqa_spec(layers=4), ModelIndex(1): mla_spec()}
PAGE = 16 * SPECS[ModelIndex(0)].kv_bytes_per_token


def run(
    pages: int,
    *requests: tuple[float, int, int, int],
    steps: int = 8,
    cap: int = 0,
    tick: float = 0.0,
    spill: int = 0,
) -> ReplayResult:
    """Replay requests of (time, model, prompt, output). ``spill`` is in pages."""
    config = EngineConfig(
        tuple(ModelConfig(f"m{index}", "nowhere") for index in SPECS),
        scheduler=SchedulerConfig(
            decode_steps=steps, chunk_quantum=16, max_chunk_tokens=64, outgrowth_risk=1.0
        ),
    )
    layouts = {index: make_layout(spec, PAGE) for index, spec in SPECS.items()}
    plan = PoolPlan(PAGE, DevicePages.of([pages]), 1, layouts, {}, spill)
    times, models, prompts, outputs = zip(*requests, strict=True)
    trace = Trace(np.array(times, float), np.array(models), np.array(prompts), np.array(outputs))
    return replay(
        trace,
        config,
        SPECS,
        plan,
        RATES,
        most_tokens=lambda prompt, output: max(output, cap),
        sample_every=0.1,
        tick=tick,
    )


def test_a_request_alone_takes_what_its_tokens_take() -> None:
    result = run(40, (1.0, 0, 200, 31), (9.0, 0, 1, 1), cap=100)
    record = result.records[0]
    assert record.arrival == SECOND
    assert record.first_token == pytest.approx(1.2 * SECOND, abs=10)
    assert record.last_token == pytest.approx(2.7 * SECOND, abs=10)
    assert (record.tokens, record.pauses, record.waits) == (31, [], {})


def test_sequences_do_not_slow_each_other() -> None:
    result = run(60, (0.0, 0, 200, 41), (0.012, 0, 300, 41), (0.016, 1, 16, 21))
    for record, first, last in zip(result.records, (0.2, 0.312, 0.032), (2.2, 2.312, 1.032), strict=True):
        assert record.first_token == pytest.approx(first * SECOND, abs=10)
        assert record.last_token == pytest.approx(last * SECOND, abs=10)
        assert record.pauses == []
    assert result.share_waiting(0.0) == 0


def test_a_tick_takes_what_happens_within_it_in_one_step() -> None:
    requests = [(0.001 * i, i % 2, 5 + i, 30) for i in range(20)]
    fine, coarse = run(100, *requests), run(100, *requests, tick=0.02)
    assert coarse.steps < fine.steps / 4
    for one, other in zip(fine.records, coarse.records, strict=True):
        assert one.tokens == other.tokens == 30
        assert 0 <= other.last_token - one.last_token < 10 * 0.02 * SECOND


def test_who_finds_the_pool_full_is_queued_until_pages_are_given_back() -> None:
    result = run(4, (0.0, 0, 48, 16), (0.3, 0, 60, 2))
    first, second = result.records
    assert first.last_token == pytest.approx(0.798 * SECOND, abs=10)
    assert second.waits == {Wait.QUEUED: pytest.approx((0.798 - 0.3) * SECOND, abs=10)}
    assert second.first_token == pytest.approx((0.798 + 0.06) * SECOND, abs=10)
    assert (result.share_waiting(0.49), result.share_waiting(0.5)) == (0.5, 0.0)


def test_who_outgrows_the_pool_takes_pages_from_who_is_due_later() -> None:
    result = run(5, (0.0, 0, 16, 60), (0.1, 0, 16, 40))
    first, second = result.records
    assert first.waited == 0 and first.pauses == []
    assert result.preemptions >= 1
    assert second.waits[Wait.PREEMPTED] > 0 and second.tokens == 40
    assert sum(second.pauses) >= second.waits[Wait.PREEMPTED]


def test_who_was_spilled_does_not_read_its_tokens_again() -> None:
    """Two prompts of 480 and of 160 tokens and 80 tokens each, and a page too few for the end."""
    requests = ((0.0, 0, 160, 80), (0.1, 0, 480, 80))
    computed, spilled = run(48, *requests), run(48, *requests, spill=100)
    assert (computed.preemptions, computed.spills) == (1, 0)
    assert (spilled.preemptions, spilled.spills) == (1, 1)
    assert spilled.spilled_bytes == spilled.returned_bytes == 34 * PAGE
    copy_time = 34 * PAGE // 10
    assert spilled.records[0].last_token - computed.records[0].last_token == copy_time
    saved = computed.records[1].last_token - spilled.records[1].last_token
    assert saved == pytest.approx(0.54 * SECOND, abs=2 * RATES.tbt)


@pytest.mark.parametrize("seed", range(20))
def test_a_requests_time_is_what_its_tokens_take_and_its_waits(seed: int) -> None:
    rng = random.Random(seed)
    requests = sorted(
        (rng.uniform(0, 8), rng.randrange(2), rng.randint(1, 150), rng.randint(1, 60)) for _ in range(60)
    )
    result = run(24, *requests)
    assert sum(record.waited > 0 for record in result.records) > 10
    for record, (_, _, prompt, output) in zip(result.records, requests, strict=True):
        assert record.tokens == output
        own = prompt * SECOND // 1000 + (output - 1) * RATES.tbt
        time = record.last_token - record.arrival
        if Wait.PREEMPTED in record.waits:
            # Reading its known tokens again makes the next one too, and may take less than a step.
            assert time > own + record.waited - (len(record.pauses) + 1) * RATES.tbt
        else:
            assert time == pytest.approx(own + record.waited, abs=20)


def test_the_pools_use_is_sampled_by_time() -> None:
    result = run(12, (0.0, 0, 160, 1), (0.5, 0, 1, 1))
    token = SPECS[ModelIndex(0)].kv_bytes_per_token
    assert result.live == [0, 100 * token, 0, 0, 0]
    # Pages come with chunks of 64 tokens.
    assert result.held == [4 * PAGE, 8 * PAGE, 0, 0, 0]


def test_who_would_never_fit_is_refused_and_the_others_are_served() -> None:
    result = run(5, (0.0, 0, 20, 4), (0.1, 0, 5 * 16, 4), (0.2, 0, 20, 4))
    assert [record.refused for record in result.records] == [False, True, False]
    assert [record.tokens for record in result.records] == [4, 0, 4]
