"""The gate of risk: how often sequences outgrow the room that it asks for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from crosspool.core.config import SchedulerConfig
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import ConfigError
from crosspool.core.ids import KvDevice, ModelIndex, Nanoseconds
from crosspool.core.kv_layout import make_layout
from crosspool.pools.kv import KvPool
from crosspool.pools.quotas import Quota
from crosspool.scheduler.output_lengths import OutputLengths
from crosspool.scheduler.risk import HORIZONS, OutgrowthRisk
from crosspool.scheduler.sequence import Sequence
from helpers_control_plane import make_request
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4, max_context=100_000)
PAGE = 16 * SPEC.kv_bytes_per_token  # one group, 16 tokens
MODELS = (ModelIndex(0), ModelIndex(1))


def make_pool(pages: int, *quotas: Quota) -> KvPool:
    layouts = {model: make_layout(SPEC, PAGE) for model in MODELS}
    given = dict(zip(MODELS, quotas, strict=False))
    return KvPool(layouts, DevicePages.of([pages]), step_tokens=64, quotas=given)


def start(
    pool: KvPool, identity: int, prompt: int, made: int, *, model: int = 0, most: int = 5000
) -> Sequence:
    sequence = Sequence(
        make_request(identity, (1,) * prompt, most, model=model), Nanoseconds(0), Nanoseconds(1), Counter()
    )
    sequence.output.extend([1] * made)
    sequence.computed = sequence.known - 1
    sequence.table = pool.open(ModelIndex(model), KvDevice(0))
    assert pool.grow(sequence.table, sequence.known)
    return sequence


def lengths_like(draw: list[int], *, model: int = 0) -> OutputLengths:
    lengths = OutputLengths()
    for tokens in draw:
        lengths.learn(ModelIndex(model), tokens)
    return lengths


def allows(pool: KvPool, lengths: OutputLengths, risk: float, running: list[Sequence], one: Sequence) -> bool:
    return OutgrowthRisk(pool, lengths, risk).forecast(running, 0).allows(one)


def least_pool(lengths: OutputLengths, risk: float, prompts: list[int]) -> int:
    """The smallest pool in which the last of these may start beside the others."""
    low, high = 1, 100_000
    while low < high:
        pool = make_pool((low + high) // 2)
        try:
            sequences = [start(pool, i, prompt, 0) for i, prompt in enumerate(prompts)]
            enough = allows(pool, lengths, risk, sequences[:-1], sequences[-1])
        except AssertionError:
            enough = False
        low, high = (low, pool.total) if enough else (pool.total + 1, high)
    return low


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("risk", [0.3, 0.05])
def test_sequences_outgrow_the_pool_about_as_often_as_was_risked(seed: int, risk: float) -> None:
    rng = random.Random(seed)
    history = [max(1, round(rng.lognormvariate(5, 1))) for _ in range(500)]
    prompts = [rng.randint(16, 400) for _ in range(40)]
    pages = least_pool(lengths_like(history), risk, prompts)
    outgrown = Counter[int]()
    for _ in range(2000):
        ends = [rng.choice(history) for _ in prompts]
        for horizon in HORIZONS:
            alive = [p + horizon for p, end in zip(prompts, ends, strict=True) if end > horizon]
            outgrown[horizon] += sum(-(-tokens // 16) for tokens in alive) > pages
    worst = max(outgrown.values()) / 2000
    assert risk / 5 < worst < 3 * risk


def test_who_runs_alone_may_always_start_within_its_share() -> None:
    nothing = OutputLengths()
    for pages in (7, 20, 300):
        for made in (0, 40):
            pool = make_pool(pages)
            one = start(pool, 0, 50, made, most=pages * 16 - 50)
            assert allows(pool, nothing, 0.001, [], one)


def test_less_risk_needs_more_room_and_no_risk_at_all_is_asked_of_nobody() -> None:
    history = lengths_like([200] * 50 + [2000] * 50)
    prompts = [100] * 20
    rooms = [least_pool(history, risk, prompts) for risk in (0.999, 0.5, 0.1, 0.001)]
    assert rooms == sorted(rooms) and len(set(rooms)) == 4
    assert least_pool(history, 1.0, prompts) == 20 * 7


def test_with_room_for_all_growth_nothing_is_computed() -> None:
    pool = make_pool(40 * 140)
    running = [start(pool, i, 64, 10) for i in range(20)]

    class Silent(OutputLengths):
        def chance_of_more(self, model: ModelIndex, made: int, more: int) -> float:
            raise AssertionError("asked")

    assert allows(pool, Silent(), 0.001, running[:-1], running[-1])
    with pytest.raises(AssertionError, match="asked"):
        allows(make_pool(400), Silent(), 0.001, running[:-1], running[-1])


def test_those_who_start_in_the_same_pass_count() -> None:
    history = lengths_like([1000] * 200)
    pool = make_pool(700)
    risk = OutgrowthRisk(pool, history, 0.1)
    waiting = [start(pool, i, 64, 0) for i in range(30)]
    forecast, started = risk.forecast([], 0), 0
    while started < 30 and forecast.allows(waiting[started]):
        forecast.started(waiting[started])
        started += 1
    # 64 + 512 tokens are 36 pages; nearly all outputs get there.
    assert 15 <= started <= 700 // 36 + 1


def test_a_static_partition_foresees_each_model_alone() -> None:
    history = lengths_like([2000] * 100)
    half = Quota(300, 300)
    for quotas, expected in (((half, half), True), ((), False)):
        pool = make_pool(600, *quotas)
        crowd = [start(pool, i, 400, 100, model=1) for i in range(9)]
        one = start(pool, 99, 32, 0, most=1000)
        assert allows(pool, history, 0.01, crowd, one) is expected
    pool = make_pool(600, half, half)
    crowd = [start(pool, i, 400, 100) for i in range(9)]
    assert not allows(pool, history, 0.01, crowd, start(pool, 99, 32, 0, most=1000))


def test_a_risk_that_is_none_is_refused() -> None:
    for risk in (0.0, -0.1, 1.5):
        with pytest.raises(ConfigError, match="outgrowth_risk must be above 0 and at most 1"):
            SchedulerConfig(outgrowth_risk=risk)
