"""Weight matrices as compiled code sees them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crosspool.kernels.numba.compile import inline
from crosspool.kernels.numba.elements import BFLOAT16, FLOAT16, FLOAT32, INT8

CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


class Matrix(NamedTuple):
    """Weights [rows, columns]: the address of the first, bytes from row to row, and for INT8 the address of
    one float32 scale a row."""

    address: int
    stride: int
    rows: int
    columns: int
    dtype: int
    scales: int


MATRIX_WORDS = len(Matrix._fields)


class Int8Weight(NamedTuple):
    """A matrix quantised to int8: ``values`` int8 [rows, columns] times ``scales`` float32 [rows]."""

    values: Tensor
    scales: Tensor


Weight = Tensor | Int8Weight


def quantise(weight: Tensor) -> Int8Weight:
    """Symmetric round-to-nearest int8 with one scale a row, such that a row's largest magnitude is 127."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return Int8Weight((wide / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scales)


def describe_matrix(weight: Weight) -> Matrix:
    """The descriptor of a matrix whose rows are contiguous each. Raises ValueError for any other."""
    values = weight.values if isinstance(weight, Int8Weight) else weight
    if values.dim() != 2 or (values.shape[1] > 1 and values.stride(1) != 1):
        raise ValueError(f"weights [{list(values.shape)}] with strides {values.stride()} have no whole rows")
    scales = weight.scales.data_ptr() if isinstance(weight, Int8Weight) else 0
    dtype = INT8 if isinstance(weight, Int8Weight) else CODES[values.dtype]
    stride = values.stride(0) * values.element_size()
    return Matrix(values.data_ptr(), stride, values.shape[0], values.shape[1], dtype, scales)


def put_matrix(fields: np.ndarray, at: int, weight: Weight) -> None:
    """Write a matrix's descriptor into a longer one, from field ``at`` on."""
    fields[at : at + MATRIX_WORDS] = describe_matrix(weight)


@inline
def matrix_at(fields, at):
    """The Matrix whose descriptor begins at field ``at``."""
    return Matrix(fields[at], fields[at + 1], fields[at + 2], fields[at + 3], fields[at + 4], fields[at + 5])
