"""Token choice against a plain numpy oracle, and the distribution of its draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crosspool.kernels.reference.sampling import (
    _GOLDEN,
    _MASK,
    Choice,
    TokenHistory,
    _draw,
    _mix,
    best,
    choose_tokens,
    uniform,
)

pytestmark = pytest.mark.backend


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def token_of(row: torch.Tensor, **how) -> int:
    how = {"seed": 0, "index": 0, "temperature": 0.0} | how
    return choose_tokens(row[None], [Choice(**how)])[0].token


def draws(row: torch.Tensor, count: int, **how) -> np.ndarray:
    choices = [Choice(**({"seed": 7, "index": i, "temperature": 1.0} | how)) for i in range(count)]
    return np.array([chosen.token for chosen in choose_tokens(row.expand(count, -1), choices)])


def oracle_distribution(row, temperature, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The filtered, renormalised probabilities, by the definitions and by nothing clever."""
    z = row.double().numpy() / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    reached = 0.0
    for i in order:
        if reached >= top_p:
            p[i] = 0
        reached += p[i]
    return p / p.sum()


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether Pearson's statistic is within five standard deviations of its mean (its seed is fixed)."""
    seen = expected > 0
    assert counts[~seen].sum() == 0
    statistic = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    freedom = seen.sum() - 1
    return statistic < freedom + 5 * math.sqrt(2 * max(1, freedom))


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 4000, "top_p": 0.999},
    ],
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_draws_follow_the_filtered_distribution(filters, temperature):
    row = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    expected = oracle_distribution(row, temperature, **filters)
    drawn = draws(row, 2500, temperature=temperature, **filters)
    assert chi_square_is_plausible(np.bincount(drawn, minlength=40), expected * 2500)


def test_every_kept_token_is_reachable_and_no_other():
    generator = torch.Generator().manual_seed(11)
    for case in range(60):
        row = torch.randn(8, generator=generator).round(decimals=1)  # with ties
        filters = {"top_k": case % 10, "top_p": (0.3, 0.7, 1.0)[case % 3], "min_p": (0.0, 0.2)[case % 2]}
        expected = set(np.flatnonzero(oracle_distribution(row, 1.0, **filters)))
        assert set(draws(row, 500, **filters).tolist()) == expected, filters


def test_nucleus_of_a_large_vocabulary_equals_the_sorted_definition():
    row = torch.randn(20_000, generator=torch.Generator().manual_seed(5)) * 3
    kept = oracle_distribution(row, 1.0, top_p=0.95) > 0
    drawn = draws(row, 300, top_p=0.95)
    assert 100 < kept.sum() < 5000 and kept[drawn].all()
    nucleus = row.clone()
    nucleus[torch.from_numpy(~kept)] = -torch.inf
    assert (draws(nucleus, 300) == drawn).all()


def test_uniform_is_uniform_and_pure():
    values = np.array([uniform(seed, i) for seed in (0, 1, -5, 2**63 - 1) for i in range(5000)])
    assert values.min() >= 0 and values.max() < 1
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    assert chi_square_is_plausible(counts, np.full(50, len(values) / 50))
    assert len(np.unique(values)) == len(values)
    assert uniform(42, 17) == uniform(42, 17)


def test_neighbouring_seeds_and_indices_are_not_correlated():
    table = np.array([[uniform(seed, i) for i in range(2000)] for seed in range(4)])
    pairs = [(table[0], table[1]), (table[2], table[3]), (table[0][:-1], table[0][1:])]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.08
    assert uniform(5 + _GOLDEN, 3) != uniform(5, 4)  # no sequence is another one shifted
    shifted = [abs(np.corrcoef(table[0][k:], table[1][: 2000 - k])[0, 1]) for k in range(1, 5)]
    assert max(shifted) < 0.1


def test_splitmix64_matches_its_published_sequence():
    """The first outputs of the generator for state 0 are the finaliser at multiples of the increment."""
    assert [_mix((i + 1) * _GOLDEN & _MASK) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_a_row_does_not_see_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 300, generator=generator)
    history = [TokenHistory([1, 2], [3]) if i % 2 else None for i in range(6)]
    choices = [
        Choice(
            seed=i,
            index=5,
            temperature=i * 0.4,
            top_p=0.9,
            repetition_penalty=1.3,
            history=history[i],
            logprobs=i if i < 3 else None,
        )
        for i in range(6)
    ]
    together = choose_tokens(rows, choices)
    assert together == [choose_tokens(rows[i : i + 1], [choices[i]])[0] for i in range(6)]
    backwards = choose_tokens(rows.flip(0), choices[::-1])
    assert backwards[::-1] == together


def test_greedy_takes_the_first_of_equals():
    assert token_of(logits_of([0.0, 2.0, 1.0, 2.0])[0]) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_temperature_near_zero_is_greedy_and_does_not_overflow(temperature):
    row = logits_of([-3e38, 10.0, 11.0, 3e38])[0]
    assert set(draws(row, 50, temperature=temperature).tolist()) == {3}


def test_min_p_one_keeps_only_the_best_and_its_equals():
    assert set(draws(logits_of([1.0, 5.0, 5.0, 4.99])[0], 200, min_p=1.0).tolist()) == {1, 2}


def test_top_k_one_and_a_tiny_top_p_are_greedy():
    row = logits_of([1.0, 5.0, 5.0, 4.99])[0]
    assert set(draws(row, 50, top_k=1).tolist()) == {1}
    assert set(draws(row, 50, top_p=1e-9).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_only_token_left_is_chosen(temperature):
    row = logits_of([9.0, 8.0, -50.0, 7.0])[0]
    assert token_of(row, temperature=temperature, suppressed=[0, 1, 3, 99]) == 2


def test_nothing_left_or_not_a_number_is_an_error():
    with pytest.raises(FloatingPointError, match="no token is left"):
        token_of(logits_of([1.0, 2.0])[0], suppressed=[0, 1])
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="NaN"):
            token_of(logits_of([1.0, bad])[0])


def test_a_zero_weight_is_never_drawn():
    row = torch.full((1000,), -1e4)
    row[[3, 500]] = 0.0
    assert set(draws(row, 400).tolist()) == {3, 500}


def test_the_ends_of_the_unit_interval_draw_weights_above_zero():
    weights = torch.tensor([0.0, 0.0, 0.3, 0.7, 0.0], dtype=torch.float64)
    assert _draw(weights, 0.0) == 2
    assert _draw(weights, 1 - 2.0**-53) == 3


def test_penalties_follow_their_definitions():
    generator = torch.Generator().manual_seed(2)
    prompt, output = [1, 2, 2, 5], [5, 7, 7, 7]
    row = torch.randn(10, generator=generator)
    expected = row.double().numpy().copy()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.7 + 0.3 * output.count(token)
    history = TokenHistory(prompt, output[:-1])
    history.append(output[-1])
    got = row.clone()
    history.penalise(got, 1.5, 0.7, 0.3)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_penalties_change_the_choice_but_not_the_logits_given():
    logits = logits_of([3.0, 2.9, 0.0])
    how = {"seed": 0, "index": 0, "temperature": 0.0, "frequency_penalty": 0.2, "logprobs": 1}
    chosen = choose_tokens(logits, [Choice(history=TokenHistory([], [0]), **how)])[0]
    assert chosen.token == 1 and chosen.rank == 2
    assert logits.tolist() == logits_of([3.0, 2.9, 0.0]).tolist()


def test_an_empty_history_changes_nothing():
    row = logits_of([1.0, -1.0])[0]
    TokenHistory([], []).penalise(row, 2.0, 2.0, 2.0)
    assert row.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("alternatives", [0, 1, 4, 50])
def test_logprobs_are_of_the_raw_distribution(alternatives):
    row = torch.randn(20, generator=torch.Generator().manual_seed(9))
    expected = row.double().numpy() - np.log(np.exp(row.double().numpy()).sum())
    how = {"temperature": 0.01, "suppressed": [int(row.argmax())], "logprobs": alternatives}
    chosen = choose_tokens(row[None], [Choice(seed=0, index=0, **how)])[0]
    assert chosen.token == int(np.argsort(-expected)[1]) and chosen.rank == 2
    assert chosen.logprob == pytest.approx(expected[chosen.token], abs=1e-6)
    order = np.argsort(-expected)[:alternatives]
    assert [token for token, _ in chosen.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in chosen.top], expected[order], atol=1e-6)


def test_best_orders_equals_by_place():
    values = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert best(values, 4).tolist() == [1, 3, 2, 4]
    assert best(values, 100).tolist() == [1, 3, 2, 4, 5, 0]


def test_no_rows():
    assert choose_tokens(torch.empty(0, 5), []) == []
