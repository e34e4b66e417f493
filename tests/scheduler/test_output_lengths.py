"""What is expected of an output's length, before there is history and after."""

from __future__ import annotations

import random

import pytest

from crosspool.core.ids import ModelIndex
from crosspool.scheduler.output_lengths import OutputLengths

pytestmark = pytest.mark.unit

A, B = ModelIndex(0), ModelIndex(1)


def learned(model: ModelIndex, *lengths: int) -> OutputLengths:
    outputs = OutputLengths()
    for tokens in lengths:
        outputs.learn(model, tokens)
    return outputs


def test_without_history_a_long_output_doubles_in_half_of_the_cases() -> None:
    nothing = OutputLengths()
    assert nothing.chance_of_more(A, 0, 256) == pytest.approx(0.5)
    assert nothing.chance_of_more(A, 20_000, 20_000) == pytest.approx(0.5, abs=0.01)


def test_a_model_becomes_what_its_outputs_were() -> None:
    outputs = learned(A, *[100] * 400)
    assert outputs.chance_of_more(A, 0, 60) > 0.97
    assert outputs.chance_of_more(A, 60, 20) > 0.97
    assert outputs.chance_of_more(A, 0, 200) < 0.03
    assert outputs.chance_of_more(A, 5000, 5000) == pytest.approx(0.5, abs=0.03), "beyond history: the prior"


def test_a_new_model_is_taken_to_be_like_the_others() -> None:
    outputs = learned(A, *[3000] * 400)
    assert outputs.chance_of_more(B, 0, 1000) > 0.95
    for _ in range(100):
        outputs.learn(B, 10)
    assert outputs.chance_of_more(B, 0, 1000) < 0.1 and outputs.chance_of_more(A, 0, 1000) > 0.9


def test_what_a_model_did_long_ago_is_forgotten() -> None:
    outputs = learned(A, *[100] * 2000, *[2000] * 1200)
    assert outputs.chance_of_more(A, 0, 1000) > 0.75


@pytest.mark.parametrize("seed", range(20))
def test_chances_are_those_of_the_outputs_drawn(seed: int) -> None:
    rng = random.Random(seed)
    middle, spread = rng.uniform(3, 7), rng.uniform(0.3, 1.5)
    lengths = [max(1, round(rng.lognormvariate(middle, spread))) for _ in range(500)]
    outputs = learned(A, *lengths)
    for _ in range(30):
        made, more = rng.choice(lengths) // 2, rng.randint(1, 2000)
        chances = [outputs.chance_of_more(A, made, tokens) for tokens in (0, more, 2 * more)]
        assert chances[0] == 1 and 1 >= chances[1] >= chances[2] > 0
        on = [length for length in lengths if length > made]
        if len(on) > 100:
            # Between two edges, a factor of 1.4 apart, lengths are taken as evenly spread.
            assert chances[1] == pytest.approx(sum(n > made + more for n in on) / len(on), abs=0.12)
