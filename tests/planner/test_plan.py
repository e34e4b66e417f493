from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from crosspool.core.errors import ConfigError
from crosspool.core.kv_layout import make_layout
from crosspool.planner.demand import Pace
from crosspool.planner.plan import PlanOptions, make_plan
from crosspool.planner.sizing import ZooModel, monolithic, pool_devices, pooled, static
from helpers_specs import gqa_spec, mla_spec
from helpers_traces import PACE, PAGE, one_page_trace, poisson_starts

pytestmark = pytest.mark.unit

MIB = 1 << 20
ZOO = [ZooModel("a", gqa_spec()), ZooModel("b", mla_spec()), ZooModel("c", gqa_spec(layers=6))]
TRACE = one_page_trace(poisson_starts(np.random.default_rng(0), [30.0, 10.0, 2.0], 16), 16)
OPTIONS: dict[str, Any] = {"pace": PACE, "risk": 0.01, "device_memory": MIB, "page_bytes": PAGE}


def test_a_plan_has_whole_pages_and_covers_what_was_seen() -> None:
    plan = make_plan(ZOO, TRACE, PlanOptions(**OPTIONS)).as_dict()
    assert plan["kv_pool_bytes"] % PAGE == 0
    low, high = plan["interval"]
    assert 0 < low < plan["kv_pool_bytes"] <= high + PAGE
    assert 1 <= plan["kv_pool_bytes"] / plan["baselines"]["empirical"] < 4
    assert plan["sum_of_peaks_bytes"] == plan["baselines"]["sum_of_peaks"] >= plan["baselines"]["maximum"]
    assert [q["share"] for q in plan["quantiles"]["by_request"]] == [0.5, 0.9, 0.99, 0.999]
    for by in plan["quantiles"].values():
        assert all(q["low"] <= q["estimated"] <= q["high"] for q in by)
        assert np.all(np.diff([q["estimated"] for q in by]) >= 0)
    assert plan["weights_pool_bytes"] == sum(model.spec.total_ffn_bytes for model in ZOO)
    assert plan["coverage"]["windows"] == 5 and plan["coverage"]["hours"] == 4
    assert plan["coverage"]["within"] <= 5 and plan["coverage"]["factor"] > 1
    assert plan["admission"]["max_running"] >= 3 and plan["admission"]["tbt_target_ms"] == 4000


def test_less_risk_and_more_confidence_cost_bytes() -> None:
    def size(**changed: Any) -> int:
        return make_plan(ZOO, TRACE, PlanOptions(**{**OPTIONS, **changed})).kv_pool_bytes

    assert size(risk=0.001) > size() > size(risk=0.3)
    assert size(confidence=0.99) > size() > size(confidence=0.3)
    assert size() == size()


def test_the_end_of_the_trace_is_what_is_fitted() -> None:
    starts = poisson_starts(np.random.default_rng(1), [60.0, 10.0, 2.0], 16)
    quiet = [some[(some < 8 * 3600) | (np.arange(len(some)) % 6 == 0)] for some in starts]
    trace = one_page_trace(quiet, 16)
    late, whole = (make_plan(ZOO, trace, PlanOptions(**OPTIONS, fit_hours=hours)) for hours in (6.0, None))
    assert late.fitted_hours == 6 and whole.fitted_hours == 16
    assert late.by_time[1].estimated < whole.by_time[1].estimated
    with pytest.raises(ConfigError, match=re.escape("fit_hours is 17, but the trace has 16 hours")):
        make_plan(ZOO, trace, PlanOptions(**OPTIONS, fit_hours=17.0))


def test_a_new_model_adds_to_the_pool_what_models_need() -> None:
    zoo = [*ZOO, ZooModel("new", gqa_spec())]
    trace = one_page_trace(poisson_starts(np.random.default_rng(0), [30.0, 30.0, 30.0, 0.0], 16), 16)
    old, new = (
        make_plan(zoo, trace, PlanOptions(**OPTIONS, observed=observed)).by_time[0].estimated
        for observed in ({}, {"new": 0.01})
    )
    assert new > 1.1 * old
    with pytest.raises(ConfigError, match="hours are given for other, but the models are a, b, c, new"):
        make_plan(zoo, trace, PlanOptions(**OPTIONS, observed={"other": 1.0}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"risk": 0.0}, "risk must be between 0 and 1, not 0.0"),
        ({"risk": 1.5}, "risk must be between 0 and 1, not 1.5"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1, not 1.0"),
        ({"fit_hours": -1.0}, "fit_hours must be above 0, not -1"),
        ({"pace": Pace(prefill_tps=0.0)}, "prefill_tps must be above 0, not 0"),
        ({"pace": Pace(tbt=float("nan"))}, "tbt_ms must be above 0, not nan"),
        ({"observed": {"a": 0.0}}, "hours of a must be above 0, not 0"),
    ],
)
def test_options_that_cannot_work(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        PlanOptions(**{**OPTIONS, **changed})


def test_modes_differ_in_who_may_use_what() -> None:
    layouts = [make_layout(model.spec, PAGE) for model in ZOO]
    memory = sum(model.weights_bytes for model in ZOO[:2]) + 40 * PAGE

    def need(models: np.ndarray) -> float:
        """20 pages for one model, 10 more for each that shares with it."""
        return (10 + 10 * int(models.sum())) * float(PAGE)

    alone = static(ZOO, layouts, memory, need)
    assert alone.kv_bytes == 60 * PAGE and alone.devices == 2
    shared = monolithic(ZOO, layouts, memory, need)
    assert shared.devices == 2 and shared.kv_bytes == 50 * PAGE
    together = pooled(ZOO, layouts, 40 * PAGE, pool_devices(ZOO, 40 * PAGE, MIB))
    assert together.largest_context["a"] == 40 * layouts[0].tokens_per_page
    assert alone.largest_context["a"] == 20 * layouts[0].tokens_per_page
    assert max(shared.largest_context.values()) > max(alone.largest_context.values())


def test_attention_sides_are_on_every_kv_device() -> None:
    attention = sum(model.spec.attention_side_bytes for model in ZOO)
    ffn = sum(model.spec.total_ffn_bytes for model in ZOO)
    memory = attention + 10 * PAGE
    pools = pool_devices(ZOO, 25 * PAGE, memory)
    assert pools.kv_devices == 3 and pools.weights_devices == -(-ffn // memory)
    mode = pooled(ZOO, [make_layout(model.spec, PAGE) for model in ZOO], 25 * PAGE, pools)
    assert mode.weights_bytes == ffn + 3 * attention
    with pytest.raises(ConfigError, match=f"3 models take {attention:,} bytes on each KV device"):
        pool_devices(ZOO, PAGE, attention)
