from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import poisson

from crosspool.planner.clusters import LONGEST, REST, Clusters
from crosspool.planner.estimate import estimate
from crosspool.planner.prior import fit_prior, own_share
from crosspool.planner.trace import HOUR
from helpers_traces import GEOMETRY, LIFE, PAGE, history_of, one_page_trace, poisson_starts

pytestmark = pytest.mark.unit

SHARES = (0.5, 0.9, 0.99, 0.999)


def test_an_infinite_server_queue_of_cold_models_is_poisson() -> None:
    """Many cold models with independent requests: M/G/infinity, of which the law is known. A request sees
    that law and itself (PASTA)."""
    hours, models, alive = 400.0, 120, 3.0
    rate = alive / models / LIFE * HOUR
    starts = poisson_starts(np.random.default_rng(5), [rate] * models, hours)
    history = history_of(one_page_trace(starts, hours))
    window = history.window(0, hours * HOUR)
    found = estimate(window, SHARES, draws=8)
    # A request counts in every cell that it touches, one more than its life has.
    law = poisson((LIFE + history.cells.seconds) / LIFE * sum(map(len, starts)) * LIFE / hours / HOUR)
    grid_error = 0.1 * PAGE
    assert np.median(found.by_time, axis=0) == pytest.approx(PAGE * law.ppf(SHARES), abs=grid_error)
    assert np.median(found.by_request, axis=0) == pytest.approx(PAGE * (law.ppf(SHARES) + 1), abs=grid_error)
    for share, bytes_seen in zip(SHARES, law.ppf(SHARES), strict=True):
        assert history.need(0, hours * HOUR, 1 - share) == pytest.approx(PAGE * (bytes_seen + 1), abs=PAGE)


def test_a_model_that_is_always_busy_does_not_meet_itself() -> None:
    hours = 20.0
    starts = [np.arange(0, hours * HOUR, LIFE + 1.0)]
    history = history_of(one_page_trace(starts, hours))
    found = estimate(history.window(0, hours * HOUR), SHARES, draws=8)
    # In the cell in which one ends and the next begins both count.
    assert found.by_time.max() <= 2.1 * PAGE


def test_requests_of_busy_models_see_the_other_ones() -> None:
    hours = 40.0
    starts = [np.arange(0, hours * HOUR, LIFE + 1.0), np.arange(50, hours * HOUR, LIFE + 1.0)]
    found = estimate(history_of(one_page_trace(starts, hours)).window(0, hours * HOUR), [0.4, 0.9999])
    assert np.median(found.by_request, axis=0) == pytest.approx(2 * PAGE, rel=0.01)


def test_bursts_need_more_than_as_many_single_requests() -> None:
    hours, rng = 100.0, np.random.default_rng(2)
    single = poisson_starts(rng, [2.0] * 10, hours)
    bursts = [np.repeat(some[::8], 8) + np.tile(np.arange(8.0), len(some[::8])) for some in single]
    needs = [
        estimate(history_of(one_page_trace(starts, hours + 1)).window(0, hours * HOUR), [0.999], draws=8)
        for starts in (single, bursts)
    ]
    assert np.median(needs[1].by_request) > 3 * np.median(needs[0].by_request)


def test_draws_tell_how_little_a_short_past_says() -> None:
    spreads = []
    for hours in (10.0, 1000.0):
        starts = poisson_starts(np.random.default_rng(1), [1.0] * 20, hours)
        window = history_of(one_page_trace(starts, hours)).window(0, hours * HOUR)
        mean = estimate(window, [0.999], draws=40).by_request[:, 0]
        spreads.append(mean.std() / mean.mean())
    assert spreads[0] > 1.5 * spreads[1]
    assert np.array_equal(estimate(window, [0.9], seed=4).by_time, estimate(window, [0.9], seed=4).by_time)


def test_clusters_are_cut_at_rest_and_at_half_hours() -> None:
    soon, later = LIFE + REST / 2, LIFE + REST + 5
    first = [100.0, 150.0, 150.0 + soon, 150.0 + soon + later]
    starts = [np.array([*first, LONGEST - 10, LONGEST + 10, *range(5000, 9500, 300)])]
    clusters = history_of(one_page_trace(starts, 3)).clusters
    assert clusters.start[:4].tolist() == [100.0, first[-1], LONGEST - 10, LONGEST + 10]
    assert clusters.request_cluster[:6].tolist() == [0, 0, 0, 1, 2, 3]
    # Two requests of the first cluster at once, from when the second comes until the first ends.
    most = clusters.level[clusters.cluster == 0].max() * GEOMETRY.bytes_per_token
    assert most == pytest.approx(2 * PAGE)
    rest = clusters.between(LONGEST, 3 * HOUR)
    assert rest.start[0] == LONGEST + 10 and rest.cluster.min() == 0 and len(rest) == len(clusters) - 3


def zoo(hours: float, rates: list[float], seed: int = 7) -> Clusters:
    return history_of(
        one_page_trace(poisson_starts(np.random.default_rng(seed), rates, hours), hours)
    ).clusters


def test_prior_of_rates_is_that_of_the_models() -> None:
    """Of a past so short that half of what the counts vary is chance, and not the models' rates."""
    hours, models = 10.0, 1500
    rates = np.random.default_rng(0).gamma(2.0, 0.2, models).tolist()
    prior = fit_prior(zoo(hours, rates), np.full(models, hours))
    assert prior.shape == pytest.approx(2.0, rel=0.2)
    assert prior.shape / prior.hours == pytest.approx(0.4, rel=0.1)


def test_a_new_model_is_judged_by_the_others_until_it_has_a_past() -> None:
    """No request within an hour says little, none within 1,000 hours says much."""
    hours, rates = 1000.0, [2.0] * 12 + [0.0]
    starts = poisson_starts(np.random.default_rng(3), rates, hours)
    window = history_of(one_page_trace(starts, hours)).window(0, hours * HOUR)
    only = np.arange(13) == 12
    by_hours = {}
    for observed in (0.1, 5.0, 1000.0):
        seen = replace(window, hours=np.where(only, observed, hours))
        by_hours[observed] = estimate(seen, [0.98], models=only, draws=200).by_time.mean()
    assert by_hours[0.1] > by_hours[5.0] > by_hours[1000.0]
    old = estimate(window, [0.98], models=np.arange(13) == 0, draws=200).by_time.mean()
    assert 0.6 * old < by_hours[0.1] < 1.5 * old
    assert by_hours[1000.0] < 0.1 * old


def test_own_clusters_count_more_the_more_there_are() -> None:
    prior = fit_prior(zoo(50.0, [1.0] * 10), np.full(10, 50.0))
    shares = own_share(prior, np.array([0, 1, 10, 10_000]))
    assert shares[0] == 0 and np.all(np.diff(shares) > 0) and shares[-1] > 0.99


def test_without_requests_nothing_is_needed() -> None:
    starts = [np.arange(0, 2000, 100.0)]
    window = history_of(one_page_trace(starts, 10)).window(5 * HOUR, 10 * HOUR)
    assert estimate(window, SHARES).upper().tolist() == [0] * 4
