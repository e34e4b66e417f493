"""The resident FFN kernel at real sizes, compiled for chips that are not there."""

from __future__ import annotations

import pytest
import torch

from crosspool.kernels.triton.ffn_plan import FfnGeometry, plan_ffn
from crosspool.kernels.triton.ffn_queue import NEWS_WORDS, FfnQueue, ask, queue_words
from crosspool.kernels.triton.resident_ffn import resident_room, serve
from crosspool.kernels.triton.router import Routing
from crosspool.kernels.triton.tiles import Chip
from crosspool.kernels.triton.words import LANE_WORDS
from helpers_triton_gates import ALL_TARGETS, SM_80, Target, assert_builds_well, needs_interpreter

pytestmark = [pytest.mark.backend, needs_interpreter]

PROGRAMS = 132
QWEN3_30B = FfnGeometry(2048, 768, routing=Routing(128, 8, normalise=True))
DEEPSEEK_V2_LITE = FfnGeometry(2048, 1408, routing=Routing(64, 6), shared_width=2816)
CASES = {
    "experts": (QWEN3_30B, 1),
    "shared": (DEEPSEEK_V2_LITE, 8),
    "dense in parts": (FfnGeometry(2048, 10_944), 1),
    "8 bits": (QWEN3_30B._replace(float8=True), 1),
}


@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_builds_well(case: str, target: Target) -> None:
    geometry, rows = CASES[case]
    plan = plan_ffn(geometry, rows, torch.bfloat16, Chip(target.shared, has_float8=target is not SM_80))
    words, news = (torch.zeros(size, dtype=torch.int64) for size in (queue_words(4), NEWS_WORDS))
    queue = FfnQueue(words, news, 4, PROGRAMS, 1000, 1_000_000)
    room = resident_room(plan, PROGRAMS, torch.device("cpu"))
    x, lane = torch.empty(rows, geometry.hidden, dtype=plan.dtype), torch.empty(LANE_WORDS, dtype=torch.int64)
    assert_builds_well(lambda: serve(plan, queue, room, 1), target)
    assert_builds_well(lambda: ask(queue, lane, 0, x, x), target, wide_loads=False)
