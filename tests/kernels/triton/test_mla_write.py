"""Latents, rotary keys and queries on their way to latent attention, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.triton import words
from crosspool.kernels.triton.mla_write import mla_write, rotate_queries
from helpers_attention_half import drawn, same_bits
from helpers_triton import DEVICE
from helpers_triton_gates import SM_90, Target, assert_builds_well, needs_interpreter, on_targets
from helpers_triton_lanes import Arena, ModelWords, lane_of

pytestmark = pytest.mark.backend

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ROWS = [(2, 3), (30, 1), (0, 5), (16, 1)]
TOKENS = 17
GAIN = 1.25
EPSILON = 0.25
HEADS, NOPE = 21, 10


@dataclass(frozen=True)
class Kind:
    rank: int
    rotary: int
    query_rank: int = 0
    interleaved: bool = False


KINDS = {"odd": Kind(19, 6), "query latent": Kind(48, 16, 37, interleaved=True)}


class Case:
    """Inputs of one layer and what is expected."""

    def __init__(self, kind: Kind, dtype: torch.dtype, seed: int = 0) -> None:
        self.kind, width = kind, kind.query_rank + kind.rank + kind.rotary
        self.down = (4 * width**0.5 * drawn(10, width, seed=seed)).to(dtype)
        self.projected = (12 * drawn(10, HEADS, NOPE + kind.rotary, seed=seed + 1)).to(dtype)
        frequencies = 100.0 ** -(torch.arange(0, kind.rotary, 2) / kind.rotary)
        self.latent_norm = 1 + drawn(kind.rank, seed=seed + 2).to(dtype)
        self.query_norm = 1 + drawn(max(kind.query_rank, 1), seed=seed + 3).to(dtype)
        layer = {words.LATENT_NORM: self.latent_norm, words.QUERY_NORM: self.query_norm}
        model = ModelWords([{}, {}, layer], {words.FREQUENCIES: frequencies})
        self.arena = Arena(
            [first + count for first, count in ROWS], (1, kind.rank + kind.rotary), TOKENS, dtype
        )
        self.model = model
        self.batch = lane_of(model, ROWS, self.arena.pages, spare_rows=1, spare_queries=2)
        positions = torch.cat([torch.arange(first, first + count) for first, count in ROWS])
        angles = torch.outer(positions.float(), frequencies)
        self.turn = (angles.cos() * GAIN, angles.sin() * GAIN)
        row_of = self.batch.row_of[:10].cpu().long()
        self.pages = self.arena.pages[row_of, 1, positions // TOKENS]
        self.slots = positions % TOKENS

    def written(self) -> Tensor:
        return self.arena.tokens()[self.pages.to(DEVICE), self.slots.to(DEVICE), 0].cpu()

    def forget_written(self) -> Tensor:
        self.arena.tokens()[self.pages.to(DEVICE), self.slots.to(DEVICE)] = 0
        return self.arena.whole.cpu().clone()


def near(computed: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(
        computed, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_latents_and_rotary_keys(dtype: torch.dtype, kind: Kind) -> None:
    case = Case(kind, dtype)
    down = case.down.to(DEVICE)
    latent = torch.full((12, kind.query_rank), 7, dtype=dtype, device=DEVICE)
    mla_write(
        case.batch,
        case.arena.kv(),
        2,
        down,
        latent if kind.query_rank else None,
        kind.rotary,
        interleaved=kind.interleaved,
        gain=GAIN,
        norm_epsilon=EPSILON,
    )
    query, own, key = case.down.split([kind.query_rank, kind.rank, kind.rotary], 1)
    written = case.written()
    near(written[:, : kind.rank], reference.rms_norm(own, case.latent_norm, EPSILON))
    turned = reference.rope(key.unsqueeze(1), *case.turn, kind.interleaved).squeeze(1)
    near(written[:, kind.rank :], turned)
    if kind.query_rank:
        near(latent[:10].cpu(), reference.rms_norm(query, case.query_norm, EPSILON))
        assert latent[10:].eq(7).all()
    assert same_bits(case.forget_written(), Case(kind, dtype).forget_written())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_queries_are_rotated(dtype: torch.dtype, kind: Kind) -> None:
    case = Case(kind, dtype)
    query = torch.full((12, HEADS, kind.rank + kind.rotary), 7, dtype=dtype, device=DEVICE)
    rotate_queries(
        case.batch,
        case.projected.to(DEVICE),
        query,
        kind.rotary,
        interleaved=kind.interleaved,
        gain=GAIN,
    )
    expected = reference.rope(case.projected[..., NOPE:], *case.turn, kind.interleaved)
    near(query[:10, :, kind.rank :].cpu(), expected)
    assert query[..., : kind.rank].eq(7).all()
    assert query[10:].eq(7).all()


def test_a_row_that_does_not_live_writes_nothing() -> None:
    case = Case(KINDS["odd"], torch.float32)
    before = case.arena.whole.cpu().clone()
    case.batch.firsts[:] = -1
    query = torch.full((12, HEADS, 25), 7.0, device=DEVICE)
    turn = {"interleaved": False, "gain": GAIN}
    mla_write(case.batch, case.arena.kv(), 2, case.down.to(DEVICE), None, 6, **turn, norm_epsilon=EPSILON)
    rotate_queries(case.batch, case.projected.to(DEVICE), query, 6, **turn)
    assert same_bits(case.arena.whole.cpu(), before)
    assert query.eq(7).all()


def launch_at_real_size() -> None:
    """DeepSeek-V2's, whose queries have a latent, 32 rows."""
    arena = Arena([1] * 32, (1, 576), 23, torch.bfloat16)
    batch = lane_of(ModelWords([{}]), [(0, 1)] * 32, arena.pages)
    down, latent = (torch.empty(32, width, dtype=torch.bfloat16) for width in (1536 + 576, 1536))
    turn = {"interleaved": True, "gain": 1.0}
    mla_write(batch, arena.kv(), 3, down, latent, 64, **turn, norm_epsilon=1e-6)
    projected, query = (torch.empty(32, 128, width, dtype=torch.bfloat16) for width in (192, 576))
    rotate_queries(batch, projected, query, 64, **turn)


@needs_interpreter
@on_targets({"deepseek-v2": launch_at_real_size}, (SM_90,))
def test_gates(launch: object, target: Target) -> None:
    assert_builds_well(launch, target)
