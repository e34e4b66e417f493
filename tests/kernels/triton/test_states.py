"""Merging states of blocks and devices, against the sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.batch import BLOCK
from crosspool.kernels.triton.states import States, merge_states
from helpers_triton import DEVICE
from helpers_triton_lanes import ModelWords, lane_of

pytestmark = pytest.mark.backend

SHAPE = AttentionShape(3, 1, 13, 0, 1.0)
BLOCKS = 40
ROWS = [(BLOCK * 40 - 1, 1), (BLOCK * 17, 1), (BLOCK * 16 - 1, 1), (0, 1)]


def drawn_states(parts: int) -> States:
    generator = torch.Generator().manual_seed(0)
    states = States.room(SHAPE, len(ROWS), BLOCK * BLOCKS, parts, DEVICE)
    states.sums.copy_(torch.randn(states.sums.shape, generator=generator))
    states.scores.copy_(torch.rand(states.scores.shape, generator=generator) * 20 + 0.1)
    return states


def merged(states: States, window: int | None) -> Tensor:
    out = torch.full((len(ROWS), SHAPE.heads, SHAPE.width), 7.0, device=DEVICE)
    merge_states(lane_of(ModelWords([{}]), ROWS), states, window, out)
    return out.cpu()


@pytest.mark.parametrize("window", [0, 1, 700, 5000])
@pytest.mark.parametrize("parts", [1, 3])
def test_states_are_added_by_weight(parts: int, window: int) -> None:
    states = drawn_states(parts)
    out = merged(states, window)
    for row, (position, _) in enumerate(ROWS):
        first = max(0, position - window + 1) // BLOCK if window else 0
        blocks = slice(first, position // BLOCK + 1)
        scores = states.scores[:, row, blocks].cpu().double()
        weights = 2 ** scores[..., 0]
        total = (weights * scores[..., 1]).sum((0, 1))
        sums = (weights[..., None] * states.sums[:, row, blocks].cpu().double()).sum((0, 1))
        torch.testing.assert_close(out[row].double(), sums / total[:, None], rtol=1e-5, atol=1e-5)


def test_one_block_of_everything() -> None:
    """As prefill makes them: whatever the positions, only the first block counts."""
    states = drawn_states(3)
    first = States(states.sums[:, :, :1].contiguous(), states.scores[:, :, :1].contiguous())
    scores, sums = first.scores[:, :, 0].cpu().double(), first.sums[:, :, 0].cpu().double()
    weights = 2 ** scores[..., 0]
    expected = (weights[..., None] * sums).sum(0) / (weights * scores[..., 1]).sum(0)[..., None]
    torch.testing.assert_close(merged(first, None).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_state_of_nothing_changes_no_bit() -> None:
    """Two parts have every state between them, in turns, and nothing of the others."""
    states, alone = drawn_states(2), drawn_states(1)
    owner = torch.arange(BLOCKS, device=DEVICE) % 2
    for part in range(2):
        states.sums[part], states.scores[part] = alone.sums[0], alone.scores[0]
        states.sums[part, :, owner != part] = 0
        states.scores[part, :, owner != part] = torch.tensor([-1e30, 0.0], device=DEVICE)
    assert torch.equal(merged(states, 0), merged(alone, 0))
