"""Projections against products in float64, of lanes of several models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels.reference import linear as reference
from crosspool.kernels.triton.linear import Projection, linear, linear_room
from crosspool.kernels.triton.tiles import Chip, PartsRoom
from crosspool.kernels.triton.words import HEAD, LANE_WORDS, OUTPUT, OUTPUT_BIAS, QKV, QUERIES, ROWS
from helpers_triton import DEVICE
from helpers_triton_gates import ALL_TARGETS, Target, assert_builds_well, needs_interpreter
from helpers_triton_tables import Lane

pytestmark = pytest.mark.backend

CHIP = Chip(shared_bytes=232_448, has_float8=True)
ROWS_OF_OUT = 20
PLAIN = Projection(outputs=70, inputs=48, word=QKV)
BIASED = Projection(outputs=24, inputs=40, word=OUTPUT, bias=OUTPUT_BIAS)
IN_PARTS = Projection(outputs=1000, inputs=1100, word=OUTPUT)


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values / shape[-1] ** 0.5).to(dtype).to(DEVICE)


def room_of(projection: Projection, capacity: int, dtype: torch.dtype) -> PartsRoom:
    return linear_room([projection], capacity, dtype, CHIP, DEVICE)


def project(
    projection: Projection, lane: Lane, x: Tensor, layer: int = 0, capacity: int = ROWS_OF_OUT
) -> Tensor:
    """The rows that x has, from a launch for ``capacity``; the others must stay as they are."""
    lane.set(QUERIES, len(x))
    padded = torch.full((capacity, projection.inputs), float("nan"), dtype=x.dtype, device=DEVICE)
    padded[: len(x)] = x
    out = torch.full((capacity, projection.outputs), 7.0, dtype=x.dtype, device=DEVICE)
    room = room_of(projection, capacity, x.dtype)
    linear(projection, lane.words, layer, padded, out, room, CHIP)
    assert out[len(x) :].eq(7).all()
    assert room.arrivals.eq(0).all()
    return out[: len(x)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("projection", [PLAIN, BIASED, IN_PARTS], ids=["plain", "biased", "parts"])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_it_is_the_product(projection: Projection, rows: int, dtype: torch.dtype) -> None:
    weight = random(projection.outputs, projection.inputs, seed=0, dtype=dtype)
    bias = random(projection.outputs, seed=1, dtype=dtype)
    x = projection.inputs**0.5 * random(rows, projection.inputs, seed=2, dtype=dtype)
    lane = Lane([{}, {projection.word: weight, OUTPUT_BIAS: bias}], {})
    expected = reference(x, weight, bias if projection.bias is not None else None)
    result = project(projection, lane, x, layer=1)
    assert result.dtype is dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("projection", [PLAIN, IN_PARTS], ids=["plain", "parts"])
def test_a_row_is_the_same_alone_and_in_any_company_and_room(
    projection: Projection, dtype: torch.dtype
) -> None:
    """The largest room has the parts of a sum in one program, and so needs none for them."""
    rooms = [len(room_of(IN_PARTS, capacity, dtype).parts) for capacity in (1, 40, 1024)]
    assert rooms == [2 * IN_PARTS.outputs, 80 * IN_PARTS.outputs, 0]
    lane = Lane([{projection.word: random(projection.outputs, projection.inputs, seed=0, dtype=dtype)}], {})
    x = random(17, projection.inputs, seed=1, dtype=dtype)
    together = project(projection, lane, x)
    assert torch.equal(project(projection, lane, x[13:14], capacity=1), together[13:14])
    assert torch.equal(project(projection, lane, x[5:9], capacity=40), together[5:9])
    assert torch.equal(project(projection, lane, x, capacity=1024), together)


def test_lanes_run_models_of_their_own() -> None:
    lanes = [
        Lane([{QKV: random(PLAIN.outputs, PLAIN.inputs, seed=seed, dtype=torch.bfloat16)}], {})
        for seed in range(2)
    ]
    x = random(2, PLAIN.inputs, seed=9, dtype=torch.bfloat16)
    first, second = (project(PLAIN, lane, x) for lane in lanes)
    assert not torch.equal(first, second)
    lanes[0].words.copy_(lanes[1].words)
    assert torch.equal(project(PLAIN, lanes[0], x), second)


def test_the_head_gives_unrounded_logits_of_selected_rows() -> None:
    head = Projection(outputs=33, inputs=48, word=HEAD, of_lane=True)
    weight = random(33, 48, seed=0, dtype=torch.bfloat16)
    lane = Lane([{}], {HEAD: weight, QUERIES: 9, ROWS: 2})
    x = random(9, 48, seed=1, dtype=torch.bfloat16)
    selected = torch.tensor([8, 3, 999, 999], dtype=torch.int32, device=DEVICE)
    logits = torch.full((4, 33), 7.0, device=DEVICE)
    room = room_of(head, 4, x.dtype)
    linear(head, lane.words, 0, x, logits, room, CHIP, count=ROWS, selected=selected)
    torch.testing.assert_close(logits[:2], x[[8, 3]].float() @ weight.float().T)
    assert logits[2:].eq(7).all()


QWEN3_30B = {
    "qkv": Projection(outputs=5120, inputs=2048, word=QKV),
    "output": Projection(outputs=2048, inputs=4096, word=OUTPUT),
    "head": Projection(outputs=151_936, inputs=2048, word=HEAD, of_lane=True),
}


def launch(projection: Projection, rows: int, chip: Chip) -> None:
    x = torch.empty(rows, projection.inputs, dtype=torch.bfloat16)
    out = torch.empty(rows, projection.outputs, dtype=torch.float32 if projection.of_lane else x.dtype)
    room = linear_room([projection], rows, x.dtype, chip, torch.device("cpu"))
    linear(projection, torch.empty(LANE_WORDS, dtype=torch.int64), 0, x, out, room, chip)


@needs_interpreter
@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
@pytest.mark.parametrize(("name", "rows"), [("qkv", 16), ("output", 16), ("qkv", 1024)])
def test_it_builds_well(name: str, rows: int, target: Target) -> None:
    chip = Chip(target.shared, has_float8=True)
    assert_builds_well(lambda: launch(QWEN3_30B[name], rows, chip), target)
