"""Expert choice, against the plain torch reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from crosspool.kernels import reference
from crosspool.kernels.numba.matrix import CODES
from crosspool.kernels.numba.router import describe_router, logits_floats, route, router_logits
from crosspool.kernels.numba.team import SHARED_WORDS, new_own

pytestmark = pytest.mark.backend

PLAIN: dict[str, Any] = {
    "top_k": 3,
    "scoring": "softmax",
    "normalise": False,
    "scale": 1.0,
    "groups": 1,
    "top_groups": 1,
    "group_score": "max",
}
RULES = {
    "softmax": PLAIN,
    "normalised": PLAIN | {"normalise": True, "scale": 2.5},
    "sigmoid": PLAIN | {"scoring": "sigmoid", "normalise": True},
    "one of one": PLAIN | {"top_k": 1},
    "all": PLAIN | {"top_k": 12},
    "groups": PLAIN | {"groups": 4, "top_groups": 2},
    "groups by two": PLAIN | {"scoring": "sigmoid", "groups": 3, "top_groups": 2, "group_score": "top2_sum"},
}


def routed(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rules: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As interface.Router."""
    fields = describe_router(weight, bias, **rules)
    shared, own = np.zeros(SHARED_WORDS, np.int64), new_own(0, 1)
    step = hidden.stride(0) * hidden.element_size()
    x = hidden.data_ptr() + step * np.arange(len(hidden), dtype=np.int64)
    logits = torch.full((len(hidden), logits_floats(len(weight), rules["groups"])), torch.nan)
    dtype = CODES[hidden.dtype]
    router_logits(shared.ctypes.data, own, fields, x, dtype, len(hidden), logits.data_ptr())
    chosen = np.full((len(hidden), rules["top_k"]), -1, np.int64)
    gains = np.full((len(hidden), rules["top_k"]), np.nan, np.float32)
    for token in range(len(hidden)):
        route(fields, logits[token].data_ptr(), chosen[token], gains[token])
    return torch.from_numpy(chosen), torch.from_numpy(gains)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_choices_and_gains_are_the_references(
    dtype: torch.dtype, rules: dict[str, Any], biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(101, 37, generator=generator).to(dtype)
    weight = torch.randn(12, 37, generator=generator).to(dtype)
    bias = torch.randn(12, generator=generator) if biased else None
    expected, expected_gains = reference.router(hidden, weight, bias, **rules)
    chosen, gains = routed(hidden, weight, bias, rules)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(gains, expected_gains, rtol=1e-5, atol=1e-6)


def test_of_equals_the_lowest_id_is_chosen() -> None:
    chosen, gains = routed(torch.ones(1, 4), torch.ones(12, 4), None, PLAIN)
    assert chosen.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(gains, torch.full((1, 3), 1 / 12))


def test_a_token_is_routed_alike_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 50, generator=generator), torch.randn(12, 50, generator=generator)
    together = routed(hidden, weight, None, PLAIN)
    for token in range(len(hidden)):
        alone = routed(hidden[token : token + 1], weight, None, PLAIN)
        assert torch.equal(alone[0][0], together[0][token])
        assert torch.equal(alone[1][0], together[1][token])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "12 experts in 5 groups"),
        ({"top_k": 4, "groups": 4, "top_groups": 1}, "top 4 of 12 experts, 1 of 4 groups"),
        ({"groups": 12, "group_score": "top2_sum"}, "ranks a group by 2 experts"),
    ],
)
def test_rules_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_router(torch.ones(12, 4), None, **PLAIN | change)
