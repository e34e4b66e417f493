"""FFNs of tables of weights against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.triton import words
from crosspool.kernels.triton.ffn import ffn
from crosspool.kernels.triton.ffn_plan import FfnGeometry, FfnPlan, FfnRoom, ffn_room, plan_ffn
from crosspool.kernels.triton.gate import ACTIVATIONS
from crosspool.kernels.triton.router import Routing
from crosspool.kernels.triton.tiles import Chip
from helpers_triton import DEVICE
from helpers_triton_ffn import CHIP, GEOMETRIES, IN_PARTS, Layer, layer_of
from helpers_triton_tables import Lane

pytestmark = pytest.mark.backend


def expected(geometry: FfnGeometry, layer: Layer, x: Tensor) -> Tensor:
    """The reference's, in float32 where weights are of 8 bits: other model dtypes do not hold those."""
    routing = geometry.routing
    wide = x.float() if geometry.float8 else x
    if routing is None or layer.router is None:
        return reference.dense_ffn(wide, layer.experts[0], geometry.activation).to(x.dtype)
    rules = {**routing._asdict()}
    del rules["experts"], rules["biased"]
    chosen, gains = reference.router(x, layer.router, None, **rules)
    result = reference.moe_ffn(wide, chosen, gains, layer.experts, layer.shared, geometry.activation)
    return result.to(x.dtype)


def room_of(plan: FfnPlan) -> FfnRoom:
    """A room that holds anything, but for the zeros that it must hold."""
    room = ffn_room(plan, DEVICE)
    for tensor in (*room, *room.pairs, room.router.parts):
        if isinstance(tensor, Tensor):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)
    return room


def compute(
    geometry: FfnGeometry,
    lane: Lane,
    x: Tensor,
    capacity: int = 20,
    layer: int = 0,
    chip: Chip = CHIP,
    spread: bool = True,
    room: FfnRoom | None = None,
) -> Tensor:
    """The rows that x has, from launches for ``capacity``; the others must stay as they are. Parts of sums
    are in one program unless they may be ``spread``."""
    lane.set(words.QUERIES, len(x))
    plan = plan_ffn(geometry, capacity, x.dtype, chip)
    if not spread:
        routed, common = (one._replace(spread=False) for one in (plan.routed, plan.common))
        plan = plan._replace(routed=routed, common=common)
    padded = torch.full((capacity, geometry.hidden), float("nan"), dtype=x.dtype, device=DEVICE)
    padded[: len(x)] = x
    out = torch.full_like(padded, 7.0)
    ffn(plan, lane.words, layer, padded, out, room or room_of(plan))
    assert out[len(x) :].eq(7).all()
    return out[: len(x)]


def hidden_states(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 9) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def assert_close(result: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype is dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_it_is_the_reference(geometry: FfnGeometry, tokens: int, dtype: torch.dtype) -> None:
    layer, x = layer_of(geometry, dtype), hidden_states(tokens, geometry.hidden, dtype)
    result = compute(geometry, Lane([{}, layer.words], {}), x, layer=1)
    assert_close(result, expected(geometry, layer, x), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    geometry = FfnGeometry(48, 24, activation)
    layer, x = layer_of(geometry, torch.float32), 3 * hidden_states(5, 48, torch.float32)
    assert_close(compute(geometry, Lane([layer.words], {}), x), expected(geometry, layer, x), torch.float32)


@pytest.mark.parametrize("has_float8", [True, False], ids=["chip converts", "kernel converts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 17])
def test_weights_in_8_bits(tokens: int, dtype: torch.dtype, has_float8: bool) -> None:
    """Of several blocks each way, cut short at the edges."""
    geometry = FfnGeometry(272, 136, routing=Routing(3, 2), shared_width=200, float8=True)
    layer, x = layer_of(geometry, dtype), hidden_states(tokens, 272, dtype)
    chip = CHIP._replace(has_float8=has_float8)
    result = compute(geometry, Lane([layer.words], {}), x, chip=chip)
    assert_close(result, expected(geometry, layer, x), dtype)


def test_each_e4m3_number_is_what_the_kernel_makes_of_it() -> None:
    """As contracted by one expert from its unit vectors: 256 numbers, less the two that are none."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = torch.where(numbers.float().isnan(), 0.0, numbers.float()).to(torch.float8_e4m3fn)
    geometry = FfnGeometry(128, 16, "relu", float8=True)
    gates, ups = torch.zeros(16, 128), torch.zeros(16, 128)
    gates[:, :16], ups[:, 16] = torch.eye(16), 1.0
    downs = numbers.view(16, 16).T.repeat(8, 1).contiguous()
    weights = {
        words.GATE_UP: torch.cat((gates, ups)).to(torch.float8_e4m3fn).to(DEVICE),
        words.GATE_UP_SCALES: torch.ones(2, 1, device=DEVICE),
        words.EXPERT_DOWN: downs.to(DEVICE),
        words.EXPERT_DOWN_SCALES: torch.ones(1, 1, device=DEVICE),
    }
    x = torch.zeros(16, 128, device=DEVICE)
    x[:, :16], x[:, 16] = torch.eye(16), 1.0
    for has_float8 in (True, False):
        result = compute(geometry, Lane([weights], {}), x, chip=CHIP._replace(has_float8=has_float8))
        assert torch.equal(result.cpu(), downs.float().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("geometry", IN_PARTS.values(), ids=IN_PARTS)
def test_a_token_is_the_same_alone_and_in_any_company_and_room(
    geometry: FfnGeometry, dtype: torch.dtype
) -> None:
    """Larger rooms have larger tiles, and the parts of sums in one program."""
    plan = plan_ffn(geometry, 20, dtype, CHIP)
    assert plan.routed.spread or plan.common.spread
    layer, x = layer_of(geometry, dtype), hidden_states(17, geometry.hidden, dtype)
    lane = Lane([layer.words], {})
    together = compute(geometry, lane, x)
    assert torch.equal(compute(geometry, lane, x[13:14], capacity=1), together[13:14])
    assert torch.equal(compute(geometry, lane, x[3:9], capacity=6), together[3:9])
    assert torch.equal(compute(geometry, lane, x, capacity=60), together)
    assert torch.equal(compute(geometry, lane, x, capacity=60, spread=False), together)


def test_lanes_run_models_of_their_own_from_the_same_launches() -> None:
    geometry = GEOMETRIES["shared"]
    layers = [layer_of(geometry, torch.bfloat16, seed) for seed in range(4)]
    lanes = [Lane([layers[0].words, layers[1].words], {}), Lane([layers[2].words, layers[3].words], {})]
    x = hidden_states(5, geometry.hidden, torch.bfloat16)
    results = []
    for number, lane in enumerate(lanes):
        for layer in range(2):
            results.append(compute(geometry, lane, x, layer=layer))
            assert_close(results[-1], expected(geometry, layers[2 * number + layer], x), torch.bfloat16)
    lanes[0].words.copy_(lanes[1].words)
    assert torch.equal(compute(geometry, lanes[0], x, layer=1), results[3])


def test_a_room_serves_one_pass_after_another() -> None:
    """Of models, layers and numbers of tokens that differ."""
    geometry = GEOMETRIES["shared"]
    lanes = [Lane([layer_of(geometry, torch.bfloat16, seed).words], {}) for seed in range(2)]
    room = room_of(plan_ffn(geometry, 20, torch.bfloat16, CHIP))
    for tokens, lane in ((17, lanes[0]), (2, lanes[1]), (1, lanes[0]), (20, lanes[1])):
        x = hidden_states(tokens, geometry.hidden, torch.bfloat16, seed=tokens)
        assert torch.equal(compute(geometry, lane, x, room=room), compute(geometry, lane, x))
    assert room.router.arrivals.eq(0).all()


def biased_to(experts: list[int], geometry: FfnGeometry, layer: Layer) -> None:
    """Every token's router chooses these."""
    assert geometry.routing is not None and layer.router is not None
    bias = torch.zeros(geometry.routing.experts)
    bias[experts] = 100.0
    layer.words[words.SELECTION_BIAS] = bias.to(DEVICE)


@pytest.mark.parametrize("experts", [[3], [0], [4]])
def test_all_tokens_may_choose_one_expert_and_others_are_not_read(experts: list[int]) -> None:
    geometry = FfnGeometry(48, 24, routing=Routing(5, 1, biased=True))
    layer = layer_of(geometry, torch.bfloat16)
    biased_to(experts, geometry, layer)
    for word in (words.GATE_UP, words.EXPERT_DOWN):
        weights = layer.words[word]
        assert isinstance(weights, Tensor)
        unread = [expert for expert in range(5) if expert not in experts]
        weights[unread] = float("nan")
    x = hidden_states(19, 48, torch.bfloat16)
    scores = (x.double() @ layer.router.double().T).softmax(-1)[:, experts[0]]
    wanted = reference.dense_ffn(x, layer.experts[experts[0]], "silu").float() * scores[:, None]
    assert_close(compute(geometry, Lane([layer.words], {}), x), wanted.bfloat16(), torch.bfloat16)


def test_experts_are_added_in_float32_in_the_order_of_their_ids() -> None:
    """A large product, its opposite and a small one: what is left says in which order they were added."""
    geometry = FfnGeometry(16, 16, "relu", routing=Routing(3, 3, "sigmoid", biased=True), shared_width=16)
    large, small = 2.0**30, 1.0
    for sizes, left in (((large, -large, small), 2.0), ((large, small, -large), 1.0)):
        layer = layer_of(geometry, torch.float32)
        for word in (words.GATE_UP, words.SHARED_GATE_UP):
            layer.words[word].fill_(1 / 16)
        layer.words[words.EXPERT_DOWN][:] = torch.tensor(sizes, device=DEVICE)[:, None, None] / 8
        layer.words[words.SHARED_DOWN].fill_(1 / 16)
        layer.words[words.ROUTER].zero_()
        # Whatever ranks first, the sum goes by ids.
        layer.words[words.SELECTION_BIAS] = torch.tensor([0.0, 2.0, 1.0], device=DEVICE)
        x = torch.ones(2, 16, device=DEVICE)
        assert compute(geometry, Lane([layer.words], {}), x).eq(left).all()


def test_a_running_sum_is_not_rounded() -> None:
    """Of seven equal experts at a seventh each nothing is lost: the sum is one expert's result."""
    geometry = FfnGeometry(48, 24, routing=Routing(7, 7))
    layer, x = layer_of(geometry, torch.bfloat16), hidden_states(5, 48, torch.bfloat16)
    for word in (words.GATE_UP, words.EXPERT_DOWN):
        layer.words[word][:] = layer.words[word][0].clone()
    layer.words[words.ROUTER].zero_()
    result = compute(geometry, Lane([layer.words], {}), x)
    assert torch.equal(result, compute(FfnGeometry(48, 24), Lane([layer.words], {}), x))


def test_shards_are_parts_of_the_whole() -> None:
    whole = FfnGeometry(48, 40, routing=Routing(5, 2), shared_width=16)
    layer, x = layer_of(whole, torch.float32), hidden_states(4, 48, torch.float32)
    total = torch.zeros(4, 48, device=DEVICE)
    for begin in (0, 1):
        own = dict(layer.words)
        for first, width in ((words.GATE_UP, 20), (words.SHARED_GATE_UP, 8)):
            half = slice(begin * width, (begin + 1) * width)
            gates, ups = layer.words[first].chunk(2, 1)
            own[first] = torch.cat((gates[:, half], ups[:, half]), 1)
            own[first + 2] = layer.words[first + 2][..., half].contiguous()
        shard = whole._replace(width=20, shared_width=8)
        total += compute(shard, Lane([own], {}), x)
    assert_close(total, expected(whole, layer, x), torch.float32)


def test_what_nobody_wrote_is_refused() -> None:
    with pytest.raises(KeyError, match="swish"):
        plan_ffn(FfnGeometry(48, 24, "swish"), 1, torch.bfloat16, CHIP)
    with pytest.raises(ValueError, match="an FFN of 0 columns, and 16 shared"):
        plan_ffn(FfnGeometry(48, 0, routing=Routing(5, 2), shared_width=16), 1, torch.bfloat16, CHIP)
    with pytest.raises(ValueError, match="top 6 of 5 experts"):
        plan_ffn(FfnGeometry(48, 24, routing=Routing(5, 6)), 1, torch.bfloat16, CHIP)
