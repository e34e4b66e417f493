"""How products with weights are cut into programs.

Weights are the left operand of every product and tokens the right one, out^T = W x^T: so a tile has at least
64 rows of weights, which is what the matrix units of newer chips want of their left operand, and as few as 16
tokens. One instruction then serves one token and a whole prompt, and W, where it is stored in 8 bits, is
widened in registers.

What decides how a sum is added up is the geometry alone: the inputs in order, cut into parts that are summed
by themselves and then added in order. The number of tokens only decides the tile and whether the parts of a
sum are in programs of their own, so a row's bits do not depend on the rows beside it. Nor do they depend on
how many there may be, wherever the chip's instructions for few and for many tokens sum as many inputs at
once: NVIDIA's do, 16 of 16 bits.

Few tokens are bound by reading weights. A multiprocessor must keep some tens of KiB of loads in flight to
have its share of the memory's bandwidth, so there should be two programs or more on each, of several stages
each, from the launch's first moment to its last: hence the parts, and shared memory for two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

FEW_TOKENS, MOST_TOKENS = 16, 128
"""Tokens of a tile: the fewest that a matrix unit takes, and the most."""

FEW_OUTPUTS, MANY_OUTPUTS = 64, 128
PROGRAMS = 256
"""About two on each multiprocessor of a large chip. It is no property of the chip that runs, for sums must
not be either."""

LEAST_PART = 512
"""Inputs of a part: with fewer, a program ends before its loads are under way."""

SCALED = 128
"""Weights in 8 bits have a scale for each block of so many rows and columns (words.py)."""


class Chip(NamedTuple):
    """``shared_bytes``: shared memory that one program may have. ``has_float8``: it converts e4m3 by itself
    (NVIDIA from compute capability 8.9 on, and what AMD's compiler emulates); otherwise kernels do."""

    shared_bytes: int
    has_float8: bool


class Tile(NamedTuple):
    """What one program computes, ``outputs`` of ``tokens``, from ``step`` inputs at a time, and with what."""

    outputs: int
    tokens: int
    step: int
    warps: int
    stages: int


def tile_for(tokens: int, dtype: torch.dtype, chip: Chip, float8: bool = False) -> Tile:
    """The tile for up to about ``tokens`` tokens in ``dtype`` that meet the same weights."""
    most = MOST_TOKENS // 2 if float8 else MOST_TOKENS  # Scaled sums take twice the registers.
    wide = min(max(triton.next_power_of_2(tokens), FEW_TOKENS), most)
    few = wide <= 2 * FEW_TOKENS
    outputs, warps = (FEW_OUTPUTS, 4) if few else (MANY_OUTPUTS, 8)
    step = SCALED if few or float8 else SCALED // 2
    if dtype.itemsize > 2:
        step = SCALED // 4
    stage = step * (outputs * (1 if float8 else dtype.itemsize) + wide * dtype.itemsize)
    return Tile(outputs, wide, step, warps, min(max(chip.shared_bytes // 2 // stage, 2), 6 if float8 else 4))


class Parts(NamedTuple):
    """``number`` parts of a sum, of ``length`` inputs each but for the last."""

    number: int
    length: int


def parts_of(outputs: int, inputs: int, at_once: int = 1) -> Parts:
    """How the sums of a product are cut where ``at_once`` such products of one token run together."""
    programs = max(at_once, 1) * triton.cdiv(outputs, FEW_OUTPUTS)
    wanted = min(max(PROGRAMS // programs, 1), max(inputs // LEAST_PART, 1))
    length = max(triton.cdiv(inputs, wanted * SCALED), 1) * SCALED
    return Parts(triton.cdiv(inputs, length), length)


class PartsRoom(NamedTuple):
    """Scratch of one launch at a time whose parts are spread over programs: ``parts`` float32, and
    ``arrivals`` int32, which are 0 between launches."""

    parts: Tensor
    arrivals: Tensor


def parts_room(values: int, sums: int, device: torch.device) -> PartsRoom:
    """Room for so many values of parts, and sums that programs wait for."""
    parts = torch.empty(values, dtype=torch.float32, device=device)
    return PartsRoom(parts, torch.zeros(sums, dtype=torch.int32, device=device))


def is_spread(parts: Parts, tile: Tile, programs: int) -> bool:
    """Whether parts are in programs of their own, where there are ``programs`` without. Many tokens have
    larger parts to write down than weights to read, so it must be worth it."""
    return parts.number > 1 and programs < (PROGRAMS if tile.outputs == FEW_OUTPUTS else PROGRAMS // 4)
