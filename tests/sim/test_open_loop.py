"""What a trace demands of a pool without end, against a count token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from crosspool.core.ids import Nanoseconds
from crosspool.core.kv_layout import KvLayout, make_layout
from crosspool.sim.fluid import Rates
from crosspool.sim.open_loop import Demand, open_loop_demand
from crosspool.sim.workload import Trace
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit

RATES = Rates(1000.0, Nanoseconds(50_000_000))
SPECS = (gqa_spec(layers=4), mla_spec(), gqa_spec(layers=6))
LAYOUTS = [make_layout(spec, 16 * SPECS[0].kv_bytes_per_token) for spec in SPECS]


def pages_at(time: float, trace: Trace, layouts: list[KvLayout]) -> int:
    """Tokens of each request that have begun to be computed, in pages."""
    total = 0
    for arrival, model, prompt, output in zip(
        trace.times, trace.models, trace.prompts, trace.outputs, strict=True
    ):
        read = prompt / 1000.0
        if arrival <= time < arrival + read + (output - 1) * 0.05:
            begun = min(prompt, int((time - arrival) * 1000) + 1)
            if time >= arrival + read:
                begun = prompt + int((time - arrival - read) / 0.05 + 1e-9) + 1
            total += layouts[model].pages(int(begun))
    return total


@pytest.mark.parametrize("seed", range(5))
def test_demand_is_that_of_a_count_by_tokens(seed: int) -> None:
    rng = random.Random(seed)
    trace = Trace(
        np.sort([rng.uniform(0, 5) for _ in range(30)]),
        np.array([rng.randrange(3) for _ in range(30)]),
        np.array([rng.randint(1, 500) for _ in range(30)]),
        np.array([rng.randint(1, 60) for _ in range(30)]),
    )
    demand = open_loop_demand(trace, LAYOUTS, RATES)
    for _ in range(200):
        time = rng.uniform(0, 9)
        before = int(np.searchsorted(demand.times, time, side="right")) - 1
        assert (0 if before < 0 else demand.pages[before]) == pages_at(time, trace, LAYOUTS), time
    assert demand.pages[-1] == 0


def test_a_quantile_is_by_time() -> None:
    demand = Demand(np.array([2.0, 5.0, 5.5, 9.0]), np.array([3, 10, 4, 0]))
    assert demand.quantile(0.3, 10.0) == 0  # 0 to 2 and 9 to 10
    assert demand.quantile(0.31, 10.0) == 3
    assert demand.quantile(0.9, 10.0) == 4
    assert demand.quantile(0.96, 10.0) == 10
    assert demand.quantile(1.0, 5.25) == 10
