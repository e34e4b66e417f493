"""What the descriptors of both kinds of attention have in common."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from crosspool.kernels.numba.matrix import CODES, Int8Weight, Weight
from crosspool.kernels.numba.norm import LANES


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor's elements are; 0: there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def piece_mine_bytes(count: int) -> int:
    """Scratch of each thread to norm and rotate pieces of up to ``count`` elements."""
    return 4 * (2 * count + LANES)


def check_types(
    matrices: Iterable[Weight | None], others: Iterable[Tensor | None], dtype: torch.dtype
) -> None:
    """Raise ValueError unless models have ``dtype``, every matrix is int8 or of that type, and all
    other tensors are contiguous in it."""
    if dtype not in CODES:
        raise ValueError(f"{dtype} is not one of {', '.join(map(str, CODES))}")
    for matrix in matrices:
        if isinstance(matrix, Tensor) and matrix.dtype != dtype:
            raise ValueError(f"a matrix of {matrix.dtype} {list(matrix.shape)} is neither int8 nor {dtype}")
        if isinstance(matrix, Int8Weight) and not (
            matrix.values.dtype == torch.int8
            and matrix.scales.dtype == torch.float32
            and matrix.scales.shape == matrix.values.shape[:1]
            and matrix.scales.is_contiguous()
        ):
            raise ValueError(
                f"int8 weights {matrix.values.dtype} {list(matrix.values.shape)} with scales "
                f"{matrix.scales.dtype} {list(matrix.scales.shape)}"
            )
    for tensor in others:
        if tensor is not None and (not tensor.is_contiguous() or tensor.dtype != dtype):
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} is not contiguous in {dtype}")
