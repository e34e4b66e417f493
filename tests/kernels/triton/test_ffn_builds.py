"""FFNs at real sizes, compiled for chips that are not there."""

from __future__ import annotations

import pytest
import torch

from crosspool.kernels.triton.contract import combine, contract
from crosspool.kernels.triton.expand import expand
from crosspool.kernels.triton.ffn_plan import FfnGeometry, FfnPlan, ffn_room, plan_ffn
from crosspool.kernels.triton.router import Routing
from crosspool.kernels.triton.tiles import Chip
from crosspool.kernels.triton.words import LANE_WORDS
from helpers_triton_gates import (
    ALL_TARGETS,
    SM_80,
    Target,
    assert_builds_well,
    needs_interpreter,
)

pytestmark = [pytest.mark.backend, needs_interpreter]

QWEN3_30B = FfnGeometry(2048, 768, routing=Routing(128, 8, normalise=True))
DEEPSEEK_V2_LITE = FfnGeometry(2048, 1408, routing=Routing(64, 6), shared_width=2816)
DEEPSEEK_V2_LITE_FIRST = FfnGeometry(2048, 10_944)


def plan_of(case: str, target: Target) -> FfnPlan:
    geometry, tokens = CASES[case]
    chip = Chip(target.shared, has_float8=target is not SM_80)
    return plan_ffn(geometry, tokens, torch.bfloat16, chip)


CASES = {
    "experts": (QWEN3_30B, 1),
    "experts of a prompt": (QWEN3_30B, 2048),
    "shared": (DEEPSEEK_V2_LITE, 16),
    "dense in parts": (DEEPSEEK_V2_LITE_FIRST, 1),
    "8 bits": (QWEN3_30B._replace(float8=True), 1),
    "8 bits of a prompt": (QWEN3_30B._replace(float8=True), 2048),
}


@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_builds_well(case: str, target: Target) -> None:
    plan = plan_of(case, target)
    room = ffn_room(plan, torch.device("cpu"))
    x = torch.empty(plan.capacity, plan.geometry.hidden, dtype=plan.dtype)
    lane = torch.empty(LANE_WORDS, dtype=torch.int64)
    assert_builds_well(lambda: expand(plan, lane, 0, x, room), target)
    assert_builds_well(lambda: contract(plan, lane, 0, room), target)
    assert_builds_well(lambda: combine(plan, lane, room, x), target, wide_loads=False)
