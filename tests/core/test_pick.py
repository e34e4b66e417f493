"""The order rule, case by case and over random columns."""

from __future__ import annotations

import random

import pytest

from crosspool.core.pick import NOTHING, delays, pick

pytestmark = pytest.mark.unit


def choose(batches: list[dict[str, int]], now: int = 0) -> int:
    def column(name: str, default: int) -> list[int]:
        return [batch.get(name, default) for batch in batches]

    return pick(
        column("ready", 1),
        column("prefill", 0),
        column("start_by", 0),
        [batch.get("order", index) for index, batch in enumerate(batches)],
        column("cost", 10),
        column("passed", 0),
        now,
    )


def test_nothing_is_ready() -> None:
    assert choose([]) == NOTHING
    assert choose([{"ready": 0}, {"ready": 0, "prefill": 1}]) == NOTHING


def test_earliest_due_then_submission_order() -> None:
    assert choose([{"start_by": 30}, {"start_by": 20}, {"start_by": 40}]) == 1
    assert choose([{"start_by": 20, "order": 7}, {"start_by": 20, "order": 3}]) == 1
    assert choose([{"prefill": 1, "start_by": 9}, {"prefill": 1, "start_by": 5}]) == 1


def test_prefill_runs_in_the_slack_before_a_decode_must_begin() -> None:
    decode, chunk = {"start_by": 100}, {"prefill": 1, "start_by": 1000, "cost": 10}
    assert choose([decode, chunk], now=90) == 1
    assert choose([decode, chunk], now=91) == 0


def test_a_decode_that_is_not_ready_here_still_guards_its_slack() -> None:
    """It is on the other side, and will be back before the chunk's layer task ends."""
    away, chunk = {"ready": 0, "start_by": 5, "passed": 1}, {"prefill": 1, "start_by": 0}
    assert choose([away, chunk]) == NOTHING
    assert choose([{**away, "passed": 0}, chunk]) == 1


def test_an_aged_prefill_goes_before_a_token_once() -> None:
    decode, aged = {"start_by": 0}, {"prefill": 1, "start_by": 50}
    assert choose([decode, aged], now=49) == 0
    assert choose([decode, aged], now=50) == 1
    assert choose([{**decode, "passed": 1}, aged], now=50) == 0


@pytest.mark.parametrize("seed", range(200))
def test_no_choice_makes_a_token_wait_for_a_second_chunk(seed: int) -> None:
    rng = random.Random(seed)
    batches = [
        {
            "ready": rng.randint(0, 1),
            "prefill": rng.randint(0, 1),
            "start_by": rng.randint(-20, 60),
            "cost": rng.randint(1, 30),
            "passed": rng.randint(0, 1),
        }
        for _ in range(rng.randint(1, 8))
    ]
    now = rng.randint(0, 50)
    chosen = choose(batches, now)
    if chosen == NOTHING:
        assert not any(batch["ready"] and not batch["prefill"] for batch in batches)
        return
    assert batches[chosen]["ready"]
    if batches[chosen]["prefill"]:
        hit = [b for b in batches if not b["prefill"] and delays(b["start_by"], batches[chosen]["cost"], now)]
        assert all(batch["passed"] == 0 for batch in hit)
