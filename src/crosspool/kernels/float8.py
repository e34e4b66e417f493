"""Weights in 8 bits: e4m3 numbers and a scale for each block of 128 rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Float8Weight(NamedTuple):
    """``numbers`` e4m3 [.., R, C] and ``scales`` float32 [.., R / 128, C / 128], rounded up."""

    numbers: Tensor
    scales: Tensor


def quantise_fp8(weight: Tensor) -> Float8Weight:
    """``weight`` [.., R, C] of any floating type -> e4m3 [.., R, C] and scales float32 [.., R / 128, C / 128]
    (rounded up): a weight is its e4m3 number times its block's scale, and the block's largest is 448 of it.

    Gates and ups of one expert are two matrices: each is quantised by itself. Raises ValueError for weights
    that are not finite.
    """
    rows, columns = (-(-size // BLOCK) for size in weight.shape[-2:])
    padding = (0, -weight.shape[-1] % BLOCK, 0, -weight.shape[-2] % BLOCK)
    padded = functional.pad(weight.abs(), padding) if any(padding) else weight.abs()
    blocks = padded.reshape(*weight.shape[:-2], rows, BLOCK, columns, BLOCK)
    largest = blocks.amax((-3, -1)).float()
    if not largest.isfinite().all():
        raise ValueError(
            f"weights {list(weight.shape)} hold {int((~weight.isfinite()).sum())} that are not finite"
        )
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    scaled = weight.float().div(_of_each(scales, weight)).clamp_(-LARGEST, LARGEST)
    return Float8Weight(scaled.to(torch.float8_e4m3fn), scales)


def dequantise_fp8(numbers: Tensor, scales: Tensor) -> Tensor:
    """The float32 [.., R, C] of what quantise_fp8 gives."""
    return numbers.float().mul_(_of_each(scales, numbers))


def _of_each(scales: Tensor, weight: Tensor) -> Tensor:
    """[.., R / 128, C / 128] -> [.., R, C] of a matrix."""
    rows, columns = weight.shape[-2:]
    return scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]
