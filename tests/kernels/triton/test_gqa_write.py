"""Queries, keys and values on their way from the projection to attention, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.triton import words
from crosspool.kernels.triton.gqa_write import gqa_write
from helpers_attention_half import drawn, same_bits
from helpers_triton import DEVICE
from helpers_triton_gates import SM_90, Target, assert_builds_well, needs_interpreter, on_targets
from helpers_triton_lanes import Arena, ModelWords, lane_of

pytestmark = pytest.mark.backend

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ROWS = [(0, 3), (100_016, 1), (32, 5), (16, 1)]
"""First positions and queries; no page is there for what is before."""
TOKENS = 17
GAIN = 1.25
EPSILON = 0.25


@dataclass(frozen=True)
class Kind:
    heads: int
    kv_heads: int
    width: int
    rotary: int
    interleaved: bool = False
    norm: bool = False


KINDS = {
    "odd": Kind(6, 2, 13, 6),
    "neighbours": Kind(5, 1, 16, 16, interleaved=True),
    "norms": Kind(3, 3, 24, 24, norm=True),
    "all": Kind(8, 2, 40, 24, interleaved=True, norm=True),
    "many heads": Kind(40, 20, 64, 64),
}


class Case:
    """Inputs of one layer, and what is expected."""

    def __init__(self, kind: Kind, dtype: torch.dtype, seed: int = 0) -> None:
        self.kind, heads = kind, kind.heads + 2 * kind.kv_heads
        self.projected = (4 * kind.width**0.5 * drawn(10, heads, kind.width, seed=seed)).to(dtype)
        self.frequencies = 10_000.0 ** -(torch.arange(0, kind.rotary, 2) / kind.rotary)
        names = (words.QUERY_NORM, words.KEY_NORM)
        self.norms = {name: 1 + drawn(kind.width, seed=seed + name).to(dtype) for name in names}
        self.words = ModelWords([{}, self.norms], {words.FREQUENCIES: self.frequencies})
        positions = torch.cat([torch.arange(first, first + count) for first, count in ROWS])
        angles = torch.outer(positions.float(), self.frequencies)
        self.turn = (angles.cos() * GAIN, angles.sin() * GAIN)
        self.row_of = torch.repeat_interleave(torch.arange(4), torch.tensor([count for _, count in ROWS]))
        # Page tables reach as far as positions, but only the chunks that are written have pages.
        self.arena = Arena([TOKENS * 2] * 4, (2, kind.kv_heads, kind.width), TOKENS, dtype, seed)
        self.chunks, self.slots = positions // TOKENS, positions % TOKENS
        self.pages = torch.full((4, 2, 100_017 // TOKENS + 1), -1)
        for row, chunk in zip(self.row_of.tolist(), self.chunks.tolist(), strict=True):
            self.pages[row, 1, chunk] = self.arena.pages[row, 1, chunk % 2]

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        kind = self.kind
        query, key, value = self.projected.split([kind.heads, kind.kv_heads, kind.kv_heads], 1)
        if kind.norm:
            query = reference.rms_norm(query, self.norms[words.QUERY_NORM], EPSILON)
            key = reference.rms_norm(key, self.norms[words.KEY_NORM], EPSILON)
        turned = [reference.rope(heads, *self.turn, kind.interleaved) for heads in (query, key)]
        return turned[0], turned[1], value

    def run(self, firsts: list[tuple[int, int]] = ROWS) -> Tensor:
        kind = self.kind
        query = torch.full((12, kind.heads, kind.width), 7, dtype=self.projected.dtype, device=DEVICE)
        gqa_write(
            lane_of(self.words, firsts, self.pages, spare_rows=1, spare_queries=2),
            self.arena.kv(),
            1,
            self.projected.to(DEVICE),
            query,
            kind.kv_heads,
            kind.rotary,
            interleaved=kind.interleaved,
            gain=GAIN,
            norm_epsilon=EPSILON if kind.norm else None,
        )
        assert query[10:].eq(7).all()
        return query[:10].cpu()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_reference_and_writes_nothing_else(dtype: torch.dtype, kind: Kind) -> None:
    cases = [Case(kind, dtype, seed) for seed in (0, 50)]
    for case in cases:
        before = case.arena.whole.cpu().clone()
        query = case.run()
        expected, keys, values = case.expected()
        limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * float(expected.abs().max())}
        torch.testing.assert_close(query, expected, **limits)

        pages = case.pages[case.row_of, 1, case.chunks]
        written = case.arena.tokens()[pages.to(DEVICE), case.slots.to(DEVICE)].cpu()
        torch.testing.assert_close(written[:, 0], keys, **limits)
        assert torch.equal(written[:, 1], values)
        case.arena.tokens()[pages.to(DEVICE), case.slots.to(DEVICE)] = 0
        after, case.arena.whole = case.arena.whole.cpu(), before.to(DEVICE)
        case.arena.tokens()[pages.to(DEVICE), case.slots.to(DEVICE)] = 0
        assert same_bits(after, case.arena.whole.cpu())


def test_a_row_that_does_not_live_writes_nothing() -> None:
    case = Case(KINDS["odd"], torch.float32)
    before = case.arena.whole.cpu().clone()
    query = case.run([(-1, 3), (-1, 1), (32, 5), (-1, 1)])
    assert query[[0, 1, 2, 3, 9]].eq(7).all()
    pages = case.pages[2, 1, case.chunks[4:9]]
    case.arena.tokens()[pages.to(DEVICE), case.slots[4:9].to(DEVICE)] = torch.nan
    after, case.arena.whole = case.arena.whole.cpu(), before.to(DEVICE)
    case.arena.tokens()[pages.to(DEVICE), case.slots[4:9].to(DEVICE)] = torch.nan
    assert torch.equal(after.isnan(), case.arena.whole.cpu().isnan())
    assert torch.equal(after.nan_to_num(), case.arena.whole.cpu().nan_to_num())


def launch_at_real_size() -> None:
    """Qwen3-30B-A3B, 32 rows."""
    arena = Arena([1] * 32, (2, 4, 128), 23, torch.bfloat16)
    gqa_write(
        lane_of(ModelWords([{}]), [(0, 1)] * 32, arena.pages),
        arena.kv(),
        3,
        torch.empty(32, 40, 128, dtype=torch.bfloat16),
        torch.empty(32, 32, 128, dtype=torch.bfloat16),
        4,
        128,
        interleaved=False,
        gain=1.0,
        norm_epsilon=1e-6,
    )


@needs_interpreter
@on_targets({"qwen3-30b-a3b": launch_at_real_size}, (SM_90,))
def test_gates(launch: object, target: Target) -> None:
    assert_builds_well(launch, target)
