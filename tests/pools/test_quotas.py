"""Floors and caps of pages, against a count that keeps nothing from one question to the next."""

from __future__ import annotations

import random

import pytest

from crosspool.core.errors import InvariantError
from crosspool.core.ids import ModelIndex
from crosspool.pools.quotas import Quota, Quotas

pytestmark = pytest.mark.unit

A, B, C = (ModelIndex(index) for index in range(3))


@pytest.mark.parametrize("seed", range(300))
def test_random_lives_keep_every_floor_and_pass_no_cap(seed: int) -> None:
    rng = random.Random(seed)
    total = rng.randint(6, 40)
    floors = [rng.randint(0, total // 3) for _ in range(3)]
    given = {
        ModelIndex(i): Quota(floor, rng.choice((None, floor + rng.randint(0, total))))
        for i, floor in enumerate(floors)
    }
    quotas, held = Quotas(given, total), dict.fromkeys(given, 0)
    caps = {model: min(total, total if quota.cap is None else quota.cap) for model, quota in given.items()}
    for _ in range(100):
        model, free = ModelIndex(rng.randrange(3)), total - sum(held.values())
        kept = sum(max(0, given[other].floor - held[other]) for other in given if other != model)
        available = quotas.available(model, free)
        assert available == min(free - kept, caps[model] - held[model])
        assert available >= max(0, min(given[model].floor, caps[model]) - held[model])
        change = rng.randint(-held[model], available)
        giver = ModelIndex(rng.randrange(3))
        if held[giver]:
            fewer = {**held, giver: held[giver] - 1}
            after = Quotas(given, total)
            for other, pages in fewer.items():
                after.count(other, pages)
            more = after.available(model, free + 1) > available
            assert quotas.gives(giver, model, available + 1) == more
        quotas.count(model, change)
        held[model] += change
        quotas.check(held, total - sum(held.values()))
        assert all(quotas.held_by(other) == pages for other, pages in held.items())


def test_what_others_want_comes_out_of_their_floors_first() -> None:
    quotas = Quotas({A: Quota(), B: Quota(floor=6), C: Quota(floor=2)}, 20)
    quotas.count(B, 4)
    quotas.count(A, 5)
    assert quotas.spare(A, 11, {}) == 11 - 2 - 2
    assert quotas.spare(A, 11, {B: 1}) == 11 - 2 - 2
    assert quotas.spare(A, 11, {B: 5, A: 2}) == 11 - 5 - 2 - 2
    assert quotas.spare(B, 11, {B: 5, A: 2}) == 11 - 2 - 2 - 5


def test_a_cap_bounds_what_is_spare_and_what_a_model_can_ever_hold() -> None:
    quotas = Quotas({A: Quota(cap=7), B: Quota(floor=6), C: Quota(cap=100)}, 10)
    assert (quotas.most(A), quotas.most(B), quotas.most(C)) == (4, 10, 4)
    quotas = Quotas({A: Quota(cap=7), B: Quota(floor=1)}, 10)
    quotas.count(A, 3)
    assert quotas.spare(A, 7, {A: 1}) == 3
    assert (quotas.room_below_cap(A), quotas.room_below_floor(B)) == (4, 1)


def test_a_broken_account_is_found() -> None:
    quotas = Quotas({A: Quota(cap=3), B: Quota(floor=4)}, 10)
    quotas.count(A, 3)
    quotas.check({A: 3, B: 0}, 7)
    with pytest.raises(InvariantError, match="counted"):
        quotas.check({A: 2, B: 0}, 8)
    with pytest.raises(InvariantError, match="3 pages are free, but 4"):
        quotas.check({A: 3, B: 0}, 3)
    quotas.count(A, 1)
    with pytest.raises(InvariantError, match="holds 4 pages, its cap is 3"):
        quotas.check({A: 4, B: 0}, 6)
