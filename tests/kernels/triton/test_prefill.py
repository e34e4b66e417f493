"""Attention of chunks of prompts, against the reference, against itself in other chunks, and in parts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.prefill import attend_part, prefill_attention
from crosspool.kernels.triton.states import States, merge_states
from helpers_triton import DEVICE
from helpers_triton_attention import GQA_SHAPES, MLA_SHAPES, TOLERANCE, Rows
from helpers_triton_gates import Target, assert_builds_well, needs_interpreter, on_targets
from helpers_triton_lanes import Arena, ModelWords, lane_of
from helpers_triton_models import DEEPSEEK_V2_LITE, QWEN3_30B_A3B

pytestmark = pytest.mark.backend

SHAPES = GQA_SHAPES | MLA_SHAPES
ROWS = [(0, 1), (250, 20), (0, 70), (255, 2), (300, 1)]


def prefilled(rows: Rows) -> Tensor:
    query, out = rows.room()
    prefill_attention(rows.batch(), rows.arena.kv(rows.window), rows.shape, query, out)
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_reference(dtype: torch.dtype, shape: AttentionShape) -> None:
    rows = Rows(ROWS, shape, dtype)
    rows.assert_near(prefilled(rows))


@pytest.mark.parametrize("window", [1, 6, 100])
@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_windows(name: str, window: int) -> None:
    """What no query of a row sees any more is not read: its pages were given back."""
    rows = Rows(ROWS, SHAPES[name], torch.float32, tokens_per_page=23, window=window)
    rows.assert_near(prefilled(rows))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_has_the_same_bits_in_any_chunk_and_company(
    dtype: torch.dtype, name: str, window: int
) -> None:
    rows = Rows(ROWS, SHAPES[name], dtype, window=window)
    together = prefilled(rows)
    for row, (_, count) in enumerate(ROWS):
        own = together[rows.queries(row)]
        for begin, end in pairwise(sorted({0, count // 3, count // 2, count})):
            assert torch.equal(prefilled(rows.alone(row, begin, end))[: end - begin], own[begin:end])


def test_rows_that_do_not_live_or_have_no_queries_are_left_alone() -> None:
    rows = Rows([(0, 3), (20, 0), (40, 30), (10, 2)], SHAPES["groups of 3"], torch.float32)
    query, out = rows.room()
    batch = rows.batch()
    batch.firsts[2] = -1
    prefill_attention(batch, rows.arena.kv(), rows.shape, query, out)
    assert out[3:33].eq(7).all()
    expected = prefilled(rows)
    assert torch.equal(out[:3], expected[:3])
    assert torch.equal(out[33:], expected[33:])


@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_a_context_on_several_devices(name: str) -> None:
    rows = Rows([(250, 20), (0, 70)], SHAPES[name], torch.float32)
    query, out = rows.room()
    batch = rows.batch()
    states = States.room(rows.shape, len(query), 1, 3, DEVICE)
    states.sums.fill_(torch.nan)
    states.scores.fill_(torch.nan)
    owner = torch.randint(0, 2, batch.pages.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for part in range(3):
        own = batch._replace(pages=batch.pages.where(owner == part, -1))
        attend_part(own, rows.arena.kv(), rows.shape, query, states.part(part))
    merge_states(batch, states, None, out)
    rows.assert_near(out)


def test_spans_that_are_elsewhere() -> None:
    rows = Rows([(2100, 3)], SHAPES["groups of 3"], torch.float32, tokens_per_page=32)
    query, out = rows.room()
    batch = rows.batch()
    states = States.room(rows.shape, len(query), 1, 2, DEVICE)
    chunk = torch.arange(batch.pages.shape[-1])
    for part, own in enumerate(((chunk >= 20) & (chunk < 45), (chunk < 20) | (chunk >= 45))):
        pages = batch.pages.where(own.to(DEVICE), -1)
        attend_part(batch._replace(pages=pages), rows.arena.kv(), rows.shape, query, states.part(part))
    merge_states(batch, states, None, out)
    rows.assert_near(out)


def launch_part(shape: AttentionShape) -> None:
    inside = (1, shape.key_width) if shape.rotary else (2, shape.kv_heads, shape.width)
    arena = Arena([1] * 4, inside, 23, torch.bfloat16)
    batch = lane_of(ModelWords([{}]), [(0, 256)] * 4, arena.pages)
    query = torch.empty(1024, shape.heads, shape.key_width, dtype=torch.bfloat16)
    states = States.room(shape, 1024, 1, 1, torch.device("cpu"))
    attend_part(batch, arena.kv(), shape, query, states)


def launch(shape: AttentionShape) -> None:
    inside = (1, shape.key_width) if shape.rotary else (2, shape.kv_heads, shape.width)
    arena = Arena([1] * 4, inside, 23, torch.bfloat16)
    batch = lane_of(ModelWords([{}]), [(0, 256)] * 4, arena.pages)
    query = torch.empty(1024, shape.heads, shape.key_width, dtype=torch.bfloat16)
    out = torch.empty(1024, shape.heads, shape.width, dtype=torch.bfloat16)
    prefill_attention(batch, arena.kv(), shape, query, out)


@needs_interpreter
@on_targets(
    {
        "qwen3-30b-a3b": lambda: launch(QWEN3_30B_A3B),
        "deepseek-v2-lite": lambda: launch(DEEPSEEK_V2_LITE),
        "qwen3-30b-a3b, a part": lambda: launch_part(QWEN3_30B_A3B),
        "deepseek-v2-lite, a part": lambda: launch_part(DEEPSEEK_V2_LITE),
    }
)
def test_gates(launch: object, target: Target) -> None:
    assert_builds_well(launch, target)
