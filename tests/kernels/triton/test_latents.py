"""Products with a matrix for each head, against plain ones, for two models in one geometry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.latents import latents_into_values, queries_into_latents
from helpers_attention_half import drawn
from helpers_triton import DEVICE
from helpers_triton_gates import Target, assert_builds_well, needs_interpreter, on_targets
from helpers_triton_lanes import ModelWords, lane_of

pytestmark = pytest.mark.backend

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HEADS, NOPE, ROTARY, RANK, VALUE = 3, 70, 6, 83, 40


class Model:
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.key = drawn(HEADS, NOPE, RANK, seed=seed).to(dtype)
        self.value = drawn(HEADS, VALUE, RANK, seed=seed + 1).to(dtype)
        self.words = ModelWords([{}, {words.EXPAND_KEY: self.key, words.EXPAND_VALUE: self.value}])

    def batch(self, queries: int) -> Pass:
        return lane_of(self.words, [(0, queries)], spare_queries=2)


def inputs(queries: int, width: int, dtype: torch.dtype) -> Tensor:
    values = 10 * drawn(queries, HEADS, width, seed=9).to(dtype)
    return torch.cat((values, torch.full((2, HEADS, width), torch.nan, dtype=dtype))).to(DEVICE)


def assert_near(out: Tensor, expected: Tensor, queries: int) -> None:
    expected = expected.to(out.dtype)
    tolerance = TOLERANCE[out.dtype]
    limit = tolerance * float(expected.abs().max())
    torch.testing.assert_close(out[:queries].cpu(), expected, rtol=2 * tolerance, atol=limit)
    assert out[queries:].eq(7).all()


@pytest.mark.parametrize("queries", [1, 37, 260])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_queries_into_latents(dtype: torch.dtype, queries: int) -> None:
    projected = inputs(queries, NOPE + ROTARY, dtype)
    for model in (Model(dtype, 0), Model(dtype, 10)):
        query = torch.full((queries + 2, HEADS, RANK + ROTARY), 7, dtype=dtype, device=DEVICE)
        queries_into_latents(model.batch(queries), 1, projected, NOPE, query)
        own = projected[:queries, :, :NOPE].cpu().double()
        expected = torch.einsum("thn,hnr->thr", own, model.key.double())
        assert_near(query[..., :RANK], expected, queries)
        assert query[..., RANK:].eq(7).all()


@pytest.mark.parametrize("queries", [1, 37, 260])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_latents_into_values(dtype: torch.dtype, queries: int) -> None:
    attended = inputs(queries, RANK, dtype)
    for model in (Model(dtype, 0), Model(dtype, 10)):
        values = torch.full((queries + 2, HEADS, VALUE), 7, dtype=dtype, device=DEVICE)
        latents_into_values(model.batch(queries), 1, attended, values)
        own = attended[:queries].cpu().double()
        assert_near(values, torch.einsum("thr,hvr->thv", own, model.value.double()), queries)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_query_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    model, attended = Model(dtype, 0), inputs(37, RANK, dtype)
    together = torch.empty(37, HEADS, VALUE, dtype=dtype, device=DEVICE)
    latents_into_values(model.batch(37), 1, attended, together)
    for query in (0, 15, 16, 36):
        alone = torch.empty(1, HEADS, VALUE, dtype=dtype, device=DEVICE)
        latents_into_values(model.batch(1), 1, attended[query : query + 1], alone)
        assert torch.equal(alone[0], together[query])


def launch(queries: int) -> None:
    """DeepSeek-V2-Lite's."""
    batch = lane_of(ModelWords([{}]), [(0, queries)])
    projected, query, attended, values = (
        torch.empty(queries, 16, width, dtype=torch.bfloat16) for width in (192, 576, 512, 128)
    )
    queries_into_latents(batch, 3, projected, 128, query)
    latents_into_values(batch, 3, attended, values)


@needs_interpreter
@on_targets({"few queries": lambda: launch(8), "many queries": lambda: launch(1024)})
def test_gates(launch: object, target: Target) -> None:
    assert_builds_well(launch, target)
