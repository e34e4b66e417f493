from __future__ import annotations

import random

import pytest

from crosspool.bench.prompts import Span, random_text, random_token_ids
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "low", "high"), [("512", 512, 512), ("128-1024", 128, 1024), (" 1 - 1 ", 1, 1)]
)
def test_a_span(text: str, low: int, high: int) -> None:
    assert Span.parse(text, least=1) == Span(low, high)


@pytest.mark.parametrize("text", ["", "a", "0", "-5", "5-", "9-3", "0-3", "1.5", "1-2-3"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a number from 1 nor a range"):
        Span.parse(text, least=1)


def test_a_span_as_text() -> None:
    assert (str(Span(3, 3)), str(Span(3, 5))) == ("3", "3-5")


def test_draws_cover_the_span() -> None:
    rng = random.Random(1)
    assert {Span(3, 5).draw(rng) for _ in range(100)} == {3, 4, 5}
    assert set(random_token_ids(rng, 300, Span(7, 9))) == {7, 8, 9}


def test_prompts_have_their_length_and_no_two_are_alike() -> None:
    rng = random.Random(1)
    ids = [random_token_ids(rng, 20, Span(100, 20_000)) for _ in range(50)]
    texts = [random_text(rng, 20) for _ in range(50)]
    assert {len(one) for one in ids} == {len(one.split()) for one in texts} == {20}
    assert len({tuple(one) for one in ids}) == len(set(texts)) == 50
