"""Attention of single queries over split contexts, against the reference and against itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.batch import BLOCK
from crosspool.kernels.triton.decode import SPLITS, attend_blocks, attend_splits, decode_attention
from crosspool.kernels.triton.states import States, fold_states, merge_states
from helpers_triton import DEVICE
from helpers_triton_attention import GQA_SHAPES, MLA_SHAPES, TOLERANCE, Rows
from helpers_triton_gates import Target, assert_builds_well, needs_interpreter, on_targets
from helpers_triton_lanes import Arena, ModelWords, lane_of
from helpers_triton_models import DEEPSEEK_V2_LITE, QWEN3_30B_A3B

pytestmark = pytest.mark.backend

SHAPES = GQA_SHAPES | MLA_SHAPES
LENGTHS = [1, 255, 256, 257, 600]
ROWS = [(length - 1, 1) for length in LENGTHS]


def decoded(rows: Rows, splits: int = 2) -> Tensor:
    query, out = rows.room()
    states = States.room(rows.shape, len(query), 700, 1, DEVICE)
    states.sums.fill_(torch.nan)
    states.scores.fill_(torch.nan)
    decode_attention(rows.batch(), rows.arena.kv(rows.window), rows.shape, query, states, out, splits)
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_reference(dtype: torch.dtype, shape: AttentionShape) -> None:
    rows = Rows(ROWS, shape, dtype)
    rows.assert_near(decoded(rows))


@pytest.mark.parametrize("window", [1, 6, 300])
@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_windows(name: str, window: int) -> None:
    """What fell out of the window is not read: its pages were given back."""
    rows = Rows(ROWS, SHAPES[name], torch.float32, tokens_per_page=23, window=window)
    rows.assert_near(decoded(rows))


def test_rows_with_several_queries() -> None:
    rows = Rows([(254, 4), (0, 3), (599, 1)], SHAPES["groups of 3"], torch.float32)
    rows.assert_near(decoded(rows))


@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_in_other_pages_and_with_any_number_of_programs(
    dtype: torch.dtype, name: str
) -> None:
    shape = SHAPES[name]
    rows = Rows(ROWS, shape, dtype)
    together = decoded(rows)
    for splits in (1, 5):
        assert torch.equal(decoded(rows, splits)[: len(ROWS)], together[: len(ROWS)])
    for row in range(len(ROWS)):
        assert torch.equal(decoded(rows.alone(row), 1)[0], together[row])
    other = Rows(ROWS, shape, dtype, tokens_per_page=29)
    assert torch.equal(decoded(other)[: len(ROWS)], together[: len(ROWS)])


def test_a_row_that_does_not_live_is_left_alone() -> None:
    rows = Rows(ROWS, SHAPES["groups of 3"], torch.float32)
    query, out = rows.room()
    batch, states = rows.batch(), States.room(rows.shape, len(query), 700, 1, DEVICE)
    batch.firsts[1] = -1
    decode_attention(batch, rows.arena.kv(), rows.shape, query, states, out, 2)
    assert out[1].eq(7).all()
    assert torch.equal(out[[0, 2, 3, 4]], decoded(rows)[[0, 2, 3, 4]])


def decoded_on_devices(rows: Rows, owner: Tensor) -> Tensor:
    """Each of three devices knows only its own pages, as the page tables of a whole pool's request say."""
    query, out = rows.room()
    batch, kv = rows.batch(), rows.arena.kv(rows.window)
    states = States.room(rows.shape, len(query), 700, 3, DEVICE)
    states.sums.fill_(torch.nan)
    states.scores.fill_(torch.nan)
    for part in range(3):
        pages = batch.pages.where(owner.to(DEVICE) == part, -1)
        attend_blocks(batch._replace(pages=pages), kv, rows.shape, query, states.part(part), 2)
    merge_states(batch, states, rows.window, out)
    return out


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_a_context_on_several_devices(name: str, window: int) -> None:
    """One of them has nothing of any context, and one nothing of a row's last blocks."""
    rows = Rows(ROWS, SHAPES[name], torch.float32, window=window)
    owner = torch.randint(0, 2, rows.batch().pages.shape, generator=torch.Generator().manual_seed(2))
    owner[4, 1, 20:] = 0
    rows.assert_near(decoded_on_devices(rows, owner))


@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_blocks_on_several_devices_give_the_same_bits(name: str) -> None:
    rows = Rows(ROWS, SHAPES[name], torch.bfloat16, tokens_per_page=32)
    chunks = torch.arange(rows.batch().pages.shape[-1])
    owner = (chunks * 32 // 256 % 2).expand(rows.batch().pages.shape)
    assert torch.equal(decoded_on_devices(rows, owner), decoded(rows))


def unwritten(rows: Rows, queries: int, context: int, parts: int) -> States:
    states = States.room(rows.shape, queries, context, parts, DEVICE)
    states.sums.fill_(torch.nan)
    states.scores.fill_(torch.nan)
    return states


def decoded_in_folded_states(rows: Rows, owner: Tensor, home: int) -> Tensor:
    """Each of three devices folds what it has, the home from states of blocks, the others from 2 splits."""
    query, out = rows.room()
    batch, kv = rows.batch(), rows.arena.kv(rows.window)
    folded = unwritten(rows, len(query), 1, 3)
    for part in range(3):
        own = batch._replace(pages=batch.pages.where(owner.to(DEVICE) == part, -1))
        if part == home:
            states = unwritten(rows, len(query), 700, 1)
            attend_blocks(own, kv, rows.shape, query, states, 2, sparse=True)
            fold_states(own, states, rows.window, folded.part(part))
        else:
            states = unwritten(rows, len(query), 2 * BLOCK, 1)
            attend_splits(own, kv, rows.shape, query, states)
            fold_states(own, states, None, folded.part(part))
    merge_states(batch, folded, None, out)
    return out


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_folded_states_of_several_devices(name: str, window: int) -> None:
    rows = Rows(ROWS, SHAPES[name], torch.float32, window=window)
    owner = torch.randint(0, 2, rows.batch().pages.shape, generator=torch.Generator().manual_seed(2))
    owner[4, 1, :20] = 1
    rows.assert_near(decoded_in_folded_states(rows, owner, home=0))


@pytest.mark.parametrize("home", [0, 2])
@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_what_is_wholly_at_home_has_the_same_bits_beside_what_is_not(name: str, home: int) -> None:
    rows = Rows(ROWS, SHAPES[name], torch.bfloat16)
    owner = torch.full(rows.batch().pages.shape, home)
    owner[2, 1, ::2] = 1
    out, whole = decoded_in_folded_states(rows, owner, home), decoded(rows)
    assert torch.equal(out[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    torch.testing.assert_close(out[2], whole[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["groups of 3", "narrow"])
def test_a_spread_row_has_the_same_bits_in_any_company(name: str) -> None:
    rows = Rows(ROWS, SHAPES[name], torch.bfloat16)
    owner = torch.randint(0, 3, rows.batch().pages.shape, generator=torch.Generator().manual_seed(3))
    together = decoded_in_folded_states(rows, owner, home=1)
    for row in range(len(ROWS)):
        own = torch.cat((owner[row : row + 1], owner[-1:]))
        assert torch.equal(decoded_in_folded_states(rows.alone(row), own, home=1)[0], together[row])


def launch(shape: AttentionShape) -> None:
    inside = (1, shape.key_width) if shape.rotary else (2, shape.kv_heads, shape.width)
    arena = Arena([1] * 8, inside, 23, torch.bfloat16)
    batch = lane_of(ModelWords([{}]), [(0, 1)] * 8, arena.pages)
    query = torch.empty(8, shape.heads, shape.key_width, dtype=torch.bfloat16)
    out = torch.empty(8, shape.heads, shape.width, dtype=torch.bfloat16)
    states = States.room(shape, 8, 1024, 1, torch.device("cpu"))
    decode_attention(batch, arena.kv(), shape, query, states, out, 8)


def launch_part(shape: AttentionShape) -> None:
    inside = (1, shape.key_width) if shape.rotary else (2, shape.kv_heads, shape.width)
    arena = Arena([1] * 8, inside, 23, torch.bfloat16)
    batch = lane_of(ModelWords([{}]), [(0, 1)] * 8, arena.pages)
    query = torch.empty(8, shape.heads, shape.key_width, dtype=torch.bfloat16)
    states, folded = (States.room(shape, 8, blocks * BLOCK, 1, torch.device("cpu")) for blocks in (SPLITS, 1))
    attend_splits(batch, arena.kv(), shape, query, states)
    fold_states(batch, states, None, folded)
    attend_blocks(batch, arena.kv(), shape, query, states, 8, sparse=True)


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
