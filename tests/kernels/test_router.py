"""Expert choice, each rule on scores that can be checked by eye."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crosspool.kernels.reference import router

pytestmark = pytest.mark.backend


def choose(logits: list[float], bias: list[float] | None = None, **rules: Any) -> dict[int, float]:
    """One token whose router logits are given -> the weight of each chosen expert."""
    defaults: dict[str, Any] = {
        "top_k": 2,
        "scoring": "softmax",
        "normalise": False,
        "scale": 1.0,
        "groups": 1,
        "top_groups": 1,
        "group_score": "max",
    }
    selection_bias = None if bias is None else torch.tensor(bias)
    chosen, weights = router(
        torch.ones(1, 1), torch.tensor(logits).unsqueeze(1), selection_bias, **{**defaults, **rules}
    )
    assert weights.dtype is torch.float32
    return dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))


def near(expected: dict[int, float]) -> object:
    return pytest.approx(expected, abs=1e-6)


def softmax(logits: list[float]) -> Tensor:
    return torch.tensor(logits).softmax(0)


def test_softmax_scores_are_over_all_experts() -> None:
    scores = softmax([0.1, 2.0, -1.0, 1.0, 0.3])
    assert choose([0.1, 2.0, -1.0, 1.0, 0.3]) == near({1: float(scores[1]), 3: float(scores[3])})


def test_normalised_weights_sum_to_the_scale() -> None:
    weights = choose([0.1, 2.0, -1.0, 1.0, 0.3], normalise=True, scale=2.5)
    assert set(weights) == {1, 3}
    assert sum(weights.values()) == pytest.approx(2.5)
    assert weights[1] / weights[3] == pytest.approx(float(torch.tensor(1.0).exp()))


def test_sigmoid_scores_are_each_their_own() -> None:
    logits = [0.1, 2.0, -1.0]
    assert choose(logits, scoring="sigmoid") == near(
        {1: float(torch.tensor(2.0).sigmoid()), 0: float(torch.tensor(0.1).sigmoid())}
    )


def test_the_bias_chooses_and_does_not_weigh() -> None:
    weights = choose([0.0, 2.0, -1.0], [0.0, -5.0, 0.0], scoring="sigmoid")
    assert weights == near({0: 0.5, 2: float(torch.tensor(-1.0).sigmoid())})


def test_groups_are_ranked_by_their_best_expert() -> None:
    logits = [3.0, -9.0, 2.0, 2.5, 1.0, 1.0]
    assert set(choose(logits, groups=3, top_groups=1)) == {0, 1}
    assert set(choose(logits, groups=3, top_groups=2)) == {0, 3}
    assert set(choose(logits)) == {0, 3}
    assert set(choose(logits, groups=3, top_groups=2, top_k=3)) == {0, 3, 2}


def test_groups_are_ranked_by_the_sum_of_their_best_two() -> None:
    logits = [3.0, -9.0, -9.0, 1.0, 1.0, -9.0]
    rules = {"scoring": "sigmoid", "groups": 2, "top_groups": 1}
    assert set(choose(logits, group_score="top2_sum", **rules)) == {3, 4}
    assert 0 in choose(logits, group_score="max", **rules)


def test_experts_outside_the_best_groups_are_never_chosen_for_negative_scores() -> None:
    bias = [-2.0, -2.0, -3.0, -3.0]
    weights = choose([0.0] * 4, bias, scoring="sigmoid", groups=2, top_groups=1, group_score="top2_sum")
    assert weights == near({0: 0.5, 1: 0.5})


def test_rules_that_nobody_wrote_are_refused() -> None:
    with pytest.raises(KeyError, match="tanh"):
        choose([0.0, 1.0], scoring="tanh")
    with pytest.raises(KeyError, match="mean"):
        choose([0.0, 1.0], groups=2, top_groups=2, group_score="mean")


def test_scores_that_vanish_stay_numbers() -> None:
    weights = choose([-200.0, -200.0, -300.0], scoring="sigmoid", normalise=True)
    assert all(0 <= weight <= 1 for weight in weights.values())


def test_bfloat16_logits_are_computed_in_float32() -> None:
    """Two experts a bfloat16 logit could not tell apart."""
    hidden = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.bfloat16)
    chosen, _ = router(
        hidden,
        weight,
        None,
        top_k=1,
        scoring="softmax",
        normalise=False,
        scale=1.0,
        groups=1,
        top_groups=1,
        group_score="max",
    )
    assert chosen.tolist() == [[1]]
