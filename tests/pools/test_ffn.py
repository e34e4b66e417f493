"""The weights pool keeps to its budget and says what it would take."""

from __future__ import annotations

import pytest

from crosspool.core.errors import InvariantError, OutOfMemoryError
from crosspool.core.ids import ModelIndex
from crosspool.core.info import Residency
from crosspool.pools.ffn import FfnPool

pytestmark = pytest.mark.unit

A, B, C = (ModelIndex(index) for index in range(3))


def test_states_and_bytes() -> None:
    pool = FfnPool(100)
    assert pool.residency(A) is Residency.COLD
    pool.begin_load(A, "a", [30, 10])
    assert (pool.residency(A), pool.used, pool.evictable) == (Residency.LOADING, 40, 0)
    pool.finish_load(A, pinned=False)
    assert (pool.residency(A), pool.evictable) == (Residency.RESIDENT, 40)
    pool.begin_load(B, "b", [50])
    pool.finish_load(B, pinned=True)
    assert (pool.residency(B), pool.evictable, pool.free) == (Residency.PINNED, 40, 10)
    pool.evict(A)
    assert (pool.residency(A), pool.free) == (Residency.COLD, 50)


def test_over_budget_is_refused_with_the_numbers_and_changes_nothing() -> None:
    pool = FfnPool(1000)
    pool.begin_load(A, "a", [600])
    pool.finish_load(A, pinned=False)
    with pytest.raises(OutOfMemoryError, match=r"model b .* 500 bytes needed, 400 bytes free, 600 bytes ev"):
        pool.begin_load(B, "b", [250, 250])
    assert pool.residency(B) is Residency.COLD and pool.free == 400


def test_a_failed_load_gives_its_bytes_back() -> None:
    pool = FfnPool(10)
    pool.begin_load(A, "a", [10])
    pool.fail_load(A)
    pool.begin_load(B, "b", [10])
    assert pool.residency(A) is Residency.COLD


def test_moves_that_must_not_happen() -> None:
    pool = FfnPool(10)
    pool.begin_load(A, "a", [1])
    with pytest.raises(InvariantError):
        pool.begin_load(A, "a", [1])
    with pytest.raises(InvariantError):
        pool.evict(A)
    pool.finish_load(A, pinned=True)
    with pytest.raises(InvariantError):
        pool.evict(A)
    with pytest.raises(InvariantError):
        pool.finish_load(C, pinned=False)
