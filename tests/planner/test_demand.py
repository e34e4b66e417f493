from __future__ import annotations

import numpy as np
import pytest

from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import ModelIndex
from crosspool.core.kv_layout import make_layout
from crosspool.planner.demand import (
    STEP_TOKENS,
    UNBOUNDED,
    Pace,
    choose_cell,
    find_demand,
    held_bytes,
    lay_out,
    most_tokens,
)
from crosspool.planner.trace import make_trace
from crosspool.pools.kv import KvPool
from helpers_specs import gqa_spec, mla_spec
from helpers_traces import LAYOUT, PAGE

pytestmark = pytest.mark.unit

LAYOUTS = {
    "one group": make_layout(gqa_spec(), 8192),
    "many groups": make_layout(gqa_spec(layers=7), 4096),
    "latent": make_layout(mla_spec(), 4096),
    "windows": make_layout(gqa_spec(windows=(None, 40, 40, None)), 4096),
    "all windows": make_layout(gqa_spec(windows=(40,) * 4), 4096),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pages_are_those_of_the_pool(name: str) -> None:
    layout, model = LAYOUTS[name], ModelIndex(0)
    pool = KvPool({model: layout}, DevicePages.of([200]), step_tokens=STEP_TOKENS)
    tokens = np.array([0, 1, 15, 16, 17, 33, 512, 560, 700, 5000])
    assert held_bytes(layout, tokens).tolist() == [
        pool.pages_for(model, int(count)) * layout.page_bytes for count in tokens
    ]


@pytest.mark.parametrize("pages", [1, 2, 9, 61, 200])
@pytest.mark.parametrize("name", LAYOUTS)
def test_longest_sequence_is_that_of_the_pool(name: str, pages: int) -> None:
    layout, model = LAYOUTS[name], ModelIndex(0)
    pool = KvPool({model: layout}, DevicePages.of([pages]), step_tokens=STEP_TOKENS)
    found = most_tokens(layout, pages * layout.page_bytes + 1)
    assert found == (UNBOUNDED if pool.most_tokens(model) > 1e6 else pool.most_tokens(model))


def test_a_request_grows_through_its_prompt_and_its_output() -> None:
    # Of 64 tokens a second for 2 s, then 10 tokens at one a second: 138 tokens in the end.
    pace, count = Pace(prefill_tps=64.0, tbt=1.0), 20
    trace = make_trace(np.arange(count) * 60.0, np.zeros(count, int), np.full(count, 128), np.full(count, 10))
    assert choose_cell(trace, pace) == 1.0
    cells = lay_out(trace, [LAYOUT], pace, 1.0)
    assert cells.count.tolist() == [13] * count
    held = cells.held[: cells.count[0]] / PAGE
    assert held.tolist() == [2, 4, *[5] * 11]


def test_levels_are_of_a_request_and_those_before_it() -> None:
    rng = np.random.default_rng(3)
    count, pace = 200, Pace(prefill_tps=100.0, tbt=0.5)
    trace = make_trace(
        rng.uniform(0, 300, count),
        rng.integers(0, 2, count),
        rng.integers(1, 400, count),
        rng.integers(0, 60, count),
    )
    cells = lay_out(trace, [LAYOUT, LAYOUTS["many groups"]], pace, 1.0)
    demand = find_demand(trace, cells)
    size = len(demand.total)
    alone = np.zeros((count, size))
    for i in range(count):
        end = min(size, cells.first[i] + cells.count[i])
        alone[i, cells.first[i] : end] = cells.held[cells.offset[i] :][: end - cells.first[i]]
    assert np.allclose(demand.total, alone.sum(axis=0))
    for i in range(count):
        assert demand.level[i] == (alone[: i + 1].sum(axis=0) * (alone[i] > 0)).max()
