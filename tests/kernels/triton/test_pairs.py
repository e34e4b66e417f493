"""Sorted pairs against a stable sort, and blocks against their definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from crosspool.kernels.triton.pairs import Pairs, most_blocks, pairs_room, sort_pairs
from crosspool.kernels.triton.words import LANE_WORDS, QUERIES
from helpers_triton import DEVICE
from helpers_triton_gates import ALL_TARGETS, Target, assert_builds_well, needs_interpreter
from helpers_triton_tables import Lane

pytestmark = pytest.mark.backend


def check(chosen: Tensor, experts: int, tokens: int, capacity: int) -> list[tuple[int, int, int]]:
    """Sort in a room for ``capacity`` tokens, which later rows of it must not disturb."""
    count, top_k = chosen.shape
    padded = torch.full((capacity, top_k), 2**30, dtype=torch.int32, device=DEVICE)
    padded[:count] = chosen
    room = pairs_room(capacity, experts, top_k, tokens, DEVICE)
    room.order.fill_(-1)
    sort_pairs(padded, Lane([{}], {QUERIES: count}).words, experts, tokens, room)
    expected = chosen.flatten().argsort(stable=True)
    assert room.order.tolist() == [*expected.tolist(), *[-1] * (capacity - count) * top_k]
    blocks = [tuple(block[:3]) for block in room.blocks.tolist()][: int(room.number)]
    assert len(blocks) <= most_blocks(count * top_k, experts, tokens) <= len(room.blocks)
    check_blocks(blocks, chosen, room, tokens)
    return blocks


def check_blocks(blocks: list[tuple[int, int, int]], chosen: Tensor, room: Pairs, tokens: int) -> None:
    """They are all places one after another, each of one expert, and full but for an expert's last."""
    places = [place for _, begin, end in blocks for place in range(begin, end)]
    assert places == list(range(chosen.numel()))
    for expert, begin, end in blocks:
        assert set(chosen.flatten()[room.order[begin:end].long()].tolist()) == {expert}
    for (expert, begin, end), following in pairwise(blocks):
        assert end - begin == tokens or following[0] != expert
        assert 0 < end - begin <= tokens


@pytest.mark.parametrize("experts", [5, 7, 33])
@pytest.mark.parametrize("count", [1, 3, 17, 40])
@pytest.mark.parametrize("top_k", [1, 3])
def test_pairs_are_sorted_and_cut(experts: int, count: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(experts + count)
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(count)]
    check(torch.stack(rows).int().to(DEVICE), experts, tokens=4, capacity=count + 2)


def test_all_tokens_may_choose_one_expert() -> None:
    chosen = torch.full((37, 1), 3, dtype=torch.int32, device=DEVICE)
    assert check(chosen, experts=5, tokens=16, capacity=37) == [(3, 0, 16), (3, 16, 32), (3, 32, 37)]


def test_more_pairs_than_are_looked_at_together() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 7, (2600, 1), generator=generator).int().to(DEVICE)
    check(chosen, experts=7, tokens=128, capacity=2600)


@pytest.mark.parametrize(("pairs", "experts", "tokens"), [(3, 5, 4), (12, 2, 4), (13, 3, 4)])
def test_so_many_blocks_there_can_be(pairs: int, experts: int, tokens: int) -> None:
    """The most of all ways to have so many pairs, tried one by one."""

    def most(pairs: int, experts: int) -> int:
        if experts == 1:
            return -(-pairs // tokens)
        return max(-(-own // tokens) + most(pairs - own, experts - 1) for own in range(pairs + 1))

    assert most_blocks(pairs, experts, tokens) == most(pairs, experts)


@needs_interpreter
@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
@pytest.mark.parametrize("experts", [128, 512])
def test_it_builds_well(experts: int, target: Target) -> None:
    chosen = torch.empty(512, 8, dtype=torch.int32)
    room = pairs_room(512, experts, 8, 16, torch.device("cpu"))
    lane = torch.empty(LANE_WORDS, dtype=torch.int64)
    assert_builds_well(lambda: sort_pairs(chosen, lane, experts, 16, room), target)
