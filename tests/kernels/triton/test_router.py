"""Expert choice against the reference, and where that promises nothing, against the rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels.reference import router as reference
from crosspool.kernels.triton.router import Routing, check_routing, route, router_room
from crosspool.kernels.triton.tiles import Chip
from crosspool.kernels.triton.words import LANE_WORDS, QUERIES, ROUTER, SELECTION_BIAS
from helpers_triton import DEVICE
from helpers_triton_gates import ALL_TARGETS, Target, assert_builds_well, needs_interpreter
from helpers_triton_tables import Lane

pytestmark = pytest.mark.backend

CHIP = Chip(shared_bytes=232_448, has_float8=True)


def choose(
    routing: Routing, x: Tensor, weight: Tensor, bias: Tensor | None = None, capacity: int = 0
) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token, from a launch for ``capacity`` or more tokens."""
    check_routing(routing)
    capacity = max(capacity, len(x))
    lane = Lane([{ROUTER: weight} | ({} if bias is None else {SELECTION_BIAS: bias})], {QUERIES: len(x)})
    padded = torch.full((capacity, x.shape[1]), float("nan"), dtype=x.dtype, device=DEVICE)
    padded[: len(x)] = x
    chosen = torch.full((capacity, routing.top_k), -1, dtype=torch.int32, device=DEVICE)
    gains = torch.full((capacity, routing.top_k), -1.0, device=DEVICE)
    room = router_room(routing, x.shape[1], capacity, x.dtype, CHIP, DEVICE)
    route(routing, lane.words, 0, padded, chosen, gains, room, CHIP)
    assert chosen[len(x) :].eq(-1).all()
    assert gains[len(x) :].eq(-1).all()
    return chosen[: len(x)], gains[: len(x)]


def given(routing: Routing, logits: list[float], bias: list[float] | None = None) -> dict[int, float]:
    """One token whose logits are given -> the weight of each chosen expert."""
    x, weight = torch.zeros(1, 16, device=DEVICE), torch.zeros(len(logits), 16, device=DEVICE)
    x[:, 0], weight[:, 0] = 1, torch.tensor(logits)
    chosen, gains = choose(routing, x, weight, None if bias is None else torch.tensor(bias, device=DEVICE))
    assert chosen[0].tolist() == sorted(chosen[0].tolist())
    return dict(zip(chosen[0].tolist(), gains[0].tolist(), strict=True))


def expected(routing: Routing, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rules = routing._asdict()
    del rules["experts"], rules["biased"]
    chosen, gains = reference(x, weight, bias, **rules)
    order = chosen.argsort(-1)
    return chosen.gather(-1, order), gains.gather(-1, order)


ROUTINGS = {
    "one": Routing(5, 1),
    "mixtral": Routing(7, 2, normalise=True),
    "deepseek-v2": Routing(60, 3, scale=16.0, groups=3, top_groups=2),
    "deepseek-v3": Routing(
        24, 8, "sigmoid", True, 2.5, groups=4, top_groups=2, group_score="top2_sum", biased=True
    ),
    "biased": Routing(70, 16, "softmax", True, biased=True),
    "all": Routing(6, 6, "sigmoid"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_it_chooses_and_weighs_as_the_reference(routing: Routing, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 136, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(routing.experts, 136, generator=generator) / 4).to(dtype).to(DEVICE)
    bias = torch.randn(routing.experts, generator=generator).to(DEVICE) if routing.biased else None
    chosen, gains = choose(routing, x, weight, bias, capacity=20)
    wanted, weights = expected(routing, x, weight, bias)
    assert chosen.tolist() == wanted.tolist()
    torch.testing.assert_close(gains, weights, rtol=1e-5, atol=1e-6)


def test_of_equals_the_lowest_ids_are_chosen() -> None:
    assert set(given(Routing(9, 3), [0, 1, 1, 0, 1, 1, 1, 0, 0])) == {1, 2, 4}
    assert set(given(Routing(6, 2, groups=3), [0, 1, 0, 1, 1, 0])) == {0, 1}
    assert set(given(Routing(6, 2, groups=3, top_groups=2), [0, 0, 1, 0, 0, 1])) == {2, 5}


def test_the_bias_chooses_and_does_not_weigh() -> None:
    weights = given(Routing(3, 2, "sigmoid", biased=True), [0.0, 2.0, -1.0], [0.0, -5.0, 0.0])
    assert weights == pytest.approx({0: 0.5, 2: float(torch.tensor(-1.0).sigmoid())})


def test_ranks_below_zero_are_ordered() -> None:
    """As biases below all scores make them."""
    bias = [-4.0, -3.0, -5.0, -3.5]
    assert set(given(Routing(4, 2, "sigmoid", biased=True), [0.0, 0.0, 0.0, 0.0], bias)) == {1, 3}
    grouped = Routing(4, 1, "sigmoid", biased=True, groups=2, group_score="top2_sum")
    assert set(given(grouped, [0.0, 0.0, 0.0, 0.0], bias)) == {1}


def test_what_is_not_a_number_shows() -> None:
    weights = given(Routing(5, 2, "sigmoid"), [1.0, 2.0, float("nan"), 3.0, 0.0])
    assert set(weights) == {2, 3}
    assert weights[2] != weights[2]
    assert all(value != value for value in given(Routing(3, 2), [1.0, float("nan"), 2.0]).values())


def test_a_token_is_the_same_alone_and_in_any_company() -> None:
    routing = ROUTINGS["deepseek-v3"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 1064, generator=generator).bfloat16().to(DEVICE)
    weight = torch.randn(24, 1064, generator=generator).bfloat16().to(DEVICE)
    bias = torch.randn(24, generator=generator).to(DEVICE)
    together = choose(routing, x, weight, bias)
    for token in (0, 13, 32):
        alone = choose(routing, x[token : token + 1], weight, bias)
        assert torch.equal(alone[0], together[0][token : token + 1])
        assert torch.equal(alone[1], together[1][token : token + 1])


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (Routing(7, 2, groups=2), "7 experts in 2 groups of which the best 1 count"),
        (Routing(8, 2, groups=4, top_groups=5), "8 experts in 4 groups of which the best 5 count"),
        (Routing(4, 1, groups=4, group_score="top2_sum"), "top2_sum ranks a group by 2 experts, of 1"),
        (Routing(8, 5, groups=2), "top 5 of 8 experts, 1 of 2 groups"),
        (Routing(8, 0), "top 0 of 8 experts, 1 of 1 groups"),
    ],
)
def test_rules_that_cannot_choose_are_refused(routing: Routing, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_routing(routing)


LARGE = {
    "qwen3-30b": (Routing(128, 8, normalise=True), 2048),
    "deepseek-v3": (ROUTINGS["deepseek-v3"]._replace(experts=256, groups=8, top_groups=4), 7168),
    "512": (Routing(512, 10, normalise=True), 2048),
}


@needs_interpreter
@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
@pytest.mark.parametrize(("name", "tokens"), [("qwen3-30b", 1), ("deepseek-v3", 1), ("512", 512)])
def test_it_builds_well(name: str, tokens: int, target: Target) -> None:
    (routing, hidden), chip, device = LARGE[name], Chip(target.shared, has_float8=True), torch.device("cpu")
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    chosen = torch.empty(tokens, routing.top_k, dtype=torch.int32)
    room = router_room(routing, hidden, tokens, x.dtype, chip, device)
    lane = torch.empty(LANE_WORDS, dtype=torch.int64)
    assert_builds_well(lambda: route(routing, lane, 0, x, chosen, chosen.float(), room, chip), target)
