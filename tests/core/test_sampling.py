"""Every field of SamplingParams has a range, and the error names it."""

from __future__ import annotations

from typing import Any

import pytest

from crosspool.core.errors import InvalidRequestError
from crosspool.core.sampling import SamplingParams

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("seed", 2**70),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("stop", ("",)),
        ("stop", ("x" * 600,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop", ("END", "a\ud800")),
        ("stop_token_ids", (-1,)),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("logprobs", 21),
    ],
)
def test_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.parameter == field
    assert field in str(caught.value) or field == "stop"


def test_a_single_stop_string_is_taken_as_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_what_makes_it_greedy_or_penalised() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams().greedy
    assert SamplingParams(repetition_penalty=1.1).penalised and not SamplingParams().penalised
