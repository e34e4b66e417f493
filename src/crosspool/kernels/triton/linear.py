"""Linear projections: of queries, keys and values, of attention's output, of latents, and the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.product import (
    PLAIN,
    is_last,
    multiply,
    multiply_all,
    rows_at,
    sum_parts,
)
from crosspool.kernels.triton.table import lane_weights, layer_weights
from crosspool.kernels.triton.tiles import (
    Chip,
    Parts,
    PartsRoom,
    Tile,
    is_spread,
    parts_of,
    parts_room,
    tile_for,
)
from crosspool.kernels.triton.words import QUERIES

_PLAIN: tl.constexpr = tl.constexpr(PLAIN)


class Projection(NamedTuple):
    """A matrix [outputs, inputs] at word ``word`` of a layer, or of the lane itself (``of_lane``), and the
    word of the same place where its bias [outputs] is, if it has one. Both are in model dtype."""

    outputs: int
    inputs: int
    word: int
    bias: int | None = None
    of_lane: bool = False


class _Plan(NamedTuple):
    tile: Tile
    parts: Parts
    spread: bool
    sums: int
    """Tiles of the output."""


def _plan(projection: Projection, capacity: int, dtype: torch.dtype, chip: Chip) -> _Plan:
    tile = tile_for(capacity, dtype, chip)
    parts = parts_of(projection.outputs, projection.inputs)
    sums = triton.cdiv(projection.outputs, tile.outputs) * triton.cdiv(capacity, tile.tokens)
    return _Plan(tile, parts, is_spread(parts, tile, sums), sums)


def linear_room(
    projections: Sequence[Projection], capacity: int, dtype: torch.dtype, chip: Chip, device: torch.device
) -> PartsRoom:
    """Room for any of the projections, of up to ``capacity`` tokens."""
    plans = [(_plan(one, capacity, dtype, chip), one.outputs) for one in projections]
    values = [plan.parts.number * capacity * outputs for plan, outputs in plans if plan.spread]
    sums = [plan.sums for plan, _ in plans if plan.spread]
    return parts_room(max(values, default=0), max(sums, default=0), device)


def linear(
    projection: Projection,
    lane: Tensor,
    layer: int,
    x: Tensor,
    out: Tensor,
    room: PartsRoom,
    chip: Chip,
    *,
    count: int = QUERIES,
    selected: Tensor | None = None,
) -> None:
    """``x`` [T, inputs] in model dtype to ``out`` [T, outputs], in model dtype or, as logits are, in float32.
    Sums, with the bias, are rounded once.

    T is the capacity: the word ``count`` of ``lane`` (int64 [LANE_WORDS]) says how many rows there are, and
    the others of ``out`` are left alone. With ``selected``, int32 [T], row r is that of ``x[selected[r]]``.
    ``layer`` is read unless the matrix is of the lane.
    """
    capacity = len(out)
    tile, parts, spread, sums = _plan(projection, capacity, x.dtype, chip)
    _linear[(sums * (parts.number if spread else 1),)](
        lane,
        layer,
        x,
        selected,
        out,
        room.parts,
        room.arrivals,
        capacity,
        OUTPUTS=projection.outputs,
        INPUTS=projection.inputs,
        WORD=projection.word,
        BIAS=projection.bias,
        OF_LANE=projection.of_lane,
        COUNT=count,
        PARTS=parts.number,
        LENGTH=parts.length,
        SPREAD=spread,
        TILE=tile.outputs,
        TOKENS=tile.tokens,
        STEP=tile.step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["layer", "capacity"])
def _linear(
    lane,
    layer,
    x,
    selected,
    out,
    parts,
    arrivals,
    capacity,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WORD: tl.constexpr,
    BIAS: tl.constexpr,
    OF_LANE: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    LENGTH: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of the output, or one part of its sums. Programs of the same weights are neighbours, so that
    many tokens read them once."""
    row_tiles = (capacity + TOKENS - 1) // TOKENS
    first = tl.program_id(0) % row_tiles * TOKENS
    count = tl.load(lane + COUNT).to(tl.int32)
    if first >= count:
        return
    rest = tl.program_id(0) // row_tiles
    output_tile = rest // PARTS if SPREAD else rest
    row = first + tl.arange(0, TOKENS)
    live = row < count
    x_row = row if selected is None else tl.load(selected + row, mask=live, other=0)
    output = output_tile * TILE + tl.arange(0, TILE)
    inside = output < OUTPUTS
    dtype: tl.constexpr = x.dtype.element_ty
    matrix = _weights(lane, layer, WORD, OF_LANE, dtype)
    weights = rows_at(matrix, tl.minimum(output, OUTPUTS - 1), INPUTS)
    x_rows = rows_at(x, x_row, INPUTS)
    place = row.to(tl.int64)[None, :] * OUTPUTS + output[:, None]
    wanted = live[None, :] & inside[:, None]
    if SPREAD:
        part = rest % PARTS
        begin = part * LENGTH
        total = multiply(weights, weights, x_rows, live, begin, INPUTS, LENGTH, _PLAIN, STEP)
        tl.store(parts + part * capacity * OUTPUTS + place, total, mask=wanted)
        if not is_last(arrivals + output_tile * row_tiles + first // TOKENS, PARTS):
            return
        total = sum_parts(parts + place, wanted, capacity * OUTPUTS, PARTS)
    else:
        total = multiply_all(weights, weights, x_rows, live, INPUTS, LENGTH, _PLAIN, STEP)
    if BIAS is not None:
        bias = _weights(lane, layer, BIAS, OF_LANE, dtype)
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _weights(lane, layer, WORD: tl.constexpr, OF_LANE: tl.constexpr, DTYPE: tl.constexpr):
    return lane_weights(lane, WORD, DTYPE) if OF_LANE else layer_weights(lane, layer, WORD, DTYPE)
