"""Predicted times follow bytes and operations, and measurements correct them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crosspool.core.batch import Half, Phase
from crosspool.core.copies import Direction
from crosspool.core.ids import ModelIndex, Nanoseconds
from crosspool.costs.calibration import Calibration
from crosspool.costs.copies import CopyCosts
from crosspool.costs.layer import HardwareProfile, LayerCosts, Work, active_share
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(hidden=1024)
PROFILE = HardwareProfile(1e12, 1e9, Nanoseconds(0))


def test_work_of_rows() -> None:
    full, windowed = LayerCosts(SPEC, PROFILE), LayerCosts(gqa_spec(windows=(5, 6)), PROFILE)
    assert full.work([(10, 1), (4, 3)]) == Work(tokens=4, context=11 + 7, attended=11 + 3 * 6)
    assert windowed.work([(10, 1), (4, 3)]) == Work(tokens=4, context=7 + 7, attended=6 + 3 * 6)
    mixed = LayerCosts(gqa_spec(windows=(5, None)), PROFILE)
    assert mixed.work([(10, 1)]) == full.work([(10, 1)])


def test_one_token_is_bound_by_bytes_and_many_by_operations() -> None:
    costs = LayerCosts(SPEC, PROFILE)
    ffn = SPEC.layers[-1].ffn
    one = costs.ffn(costs.work([(0, 1)]))
    share = ffn.router.top_k / ffn.router.num_experts  # type: ignore[union-attr]
    assert one == int(ffn.weights(1024) * 2 * share / 1e9 * 1e9)
    many = costs.ffn(costs.work([(0, 100_000)]))
    assert many == pytest.approx(2 * 100_000 * ffn.active_weights(1024) / 1e12 * 1e9, rel=1e-6)


def test_int8_weights_are_read_in_their_own_bytes() -> None:
    spec = replace(gqa_spec(hidden=64), int8_weights=True)
    costs, work = LayerCosts(spec, HardwareProfile(1e18, 1e9, Nanoseconds(0))), Work(1, 0, 0)
    experts, width, heads, head = 5, 24, 3, 8
    matrices = experts * (3 * 64 * width + 4 * (2 * width + 64))
    assert costs.ffn(work) == pytest.approx((matrices + 2 * experts * 64) * 2 / 5, abs=1)
    projections = 2 * 64 * heads * head + 2 * 64 * head + 4 * (heads * head + 2 * head + 64)
    assert costs.attention(work) == projections + 2 * 2 * 64
    assert costs.head(1) == 97 * 64 + 4 * 97


def test_float8_ffns_are_read_in_their_own_bytes() -> None:
    plain = gqa_spec(hidden=200)
    costs = LayerCosts(plain.with_float8([3]), HardwareProfile(1e18, 1e9, Nanoseconds(0)))
    experts, width, hidden, blocks = 5, 24, 200, 3 * 2 * 1
    matrices = experts * (3 * hidden * width + 4 * blocks)
    assert costs.ffn(Work(1, 0, 0)) == pytest.approx((matrices + 2 * experts * hidden) * 2 / 5, abs=1)
    assert costs.attention(Work(1, 0, 0)) == LayerCosts(plain, costs.profile).attention(Work(1, 0, 0))


def test_longer_context_costs_attention_alone() -> None:
    costs = LayerCosts(SPEC, PROFILE)
    short, long = costs.work([(10, 1)]), costs.work([(100_000, 1)])
    extra = costs.half(Half.ATTENTION, long) - costs.half(Half.ATTENTION, short)
    assert extra == pytest.approx((100_000 - 10) * SPEC.kv_bytes_per_token_layer, rel=1e-3)
    assert costs.half(Half.FFN, long) == costs.half(Half.FFN, short)


def test_every_expert_is_touched_in_the_end() -> None:
    ffn = SPEC.layers[-1].ffn
    shares = [active_share(ffn, tokens) for tokens in (1, 2, 50)]
    assert shares[0] == pytest.approx(2 / 5) and shares[0] < shares[1] < shares[2] <= 1


def test_calibration_starts_at_the_prediction_and_follows_the_measurements() -> None:
    calibration, model = Calibration(), ModelIndex(0)
    key = (model, Phase.DECODE, Half.FFN)
    assert calibration.correct(*key, 4, 1000) == 1000
    calibration.learn(*key, 4, 1000, 3000)
    assert calibration.correct(*key, 4, 1000) == 3000
    calibration.learn(*key, 4, 1000, 1000)
    assert calibration.correct(*key, 4, 1000) == 2000, "the first measurements count alike"
    for _ in range(30):
        calibration.learn(*key, 4, 1000, 1500)
    assert calibration.correct(*key, 4, 1000) == pytest.approx(1500, rel=0.01)
    calibration.learn(*key, 4, 1000, 0)
    assert calibration.correct(*key, 4, 1000) == pytest.approx(1500, rel=0.01)
    assert calibration.correct(model, Phase.PREFILL, Half.FFN, 4, 1000) == 1000


def test_few_tokens_teach_nothing_of_many_but_where_nothing_else_is_known() -> None:
    """Bound by bytes, a prompt's end takes a third of what was predicted; bound by operations, a tenth."""
    calibration, key = Calibration(), (ModelIndex(0), Phase.PREFILL, Half.FFN)
    calibration.learn(*key, 64, 10_000, 3_000)
    assert calibration.correct(*key, 512, 60_000) == pytest.approx(18_000, abs=1)
    for _ in range(20):
        calibration.learn(*key, 448, 50_000, 5_000)
        calibration.learn(*key, 64, 10_000, 3_000)
    assert calibration.correct(*key, 512, 60_000) == pytest.approx(6_000, abs=1)
    assert calibration.correct(*key, 65, 10_000) == pytest.approx(3_000, abs=1)
    calibration.learn(*key, 600, 0, 1)
    assert calibration.correct(*key, 512, 60_000) == pytest.approx(6_000, abs=1), "nothing was predicted"


def test_each_direction_of_copies_has_the_bandwidth_that_was_measured() -> None:
    costs = CopyCosts(HardwareProfile(copy_bytes_per_second=2e9))
    assert costs.time(Direction.OUT, 1_000_000) == costs.time(Direction.IN, 1_000_000) == 500_000
    costs.learn(Direction.OUT, 4000, Nanoseconds(8000))
    assert costs.time(Direction.OUT, 1_000_000) == 2_000_000
    assert costs.time(Direction.IN, 1_000_000) == 500_000
    costs.learn(Direction.IN, 4000, Nanoseconds(0))
    assert costs.time(Direction.IN, 1_000_000) == 500_000, "a copy that was dropped teaches nothing"
