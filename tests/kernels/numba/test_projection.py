"""Compiled projections and rotary embedding, against the plain torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspool.kernels import reference
from crosspool.kernels.numba.batch import rope_angles
from crosspool.kernels.numba.linear import UNIT_BYTES, VECTORS_AT_ONCE
from crosspool.kernels.numba.matrix import CODES, describe_matrix
from crosspool.kernels.numba.projection import (
    LARGER,
    MANY,
    project,
    projection_mine_bytes,
    projection_units,
)
from crosspool.kernels.numba.rope import rotate

pytestmark = pytest.mark.backend

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 130, MANY + 5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_a_projection_is_the_references(dtype: torch.dtype, count: int, biased: bool, adds: bool) -> None:
    rows, columns = (2 if count < MANY else 2 * LARGER) * UNIT_BYTES // (37 * dtype.itemsize), 37
    weight, x = drawn(rows, columns, dtype=dtype, seed=0), drawn(count, columns, dtype=dtype, seed=1)
    bias = drawn(rows, dtype=dtype, seed=2) if biased else None
    stream = drawn(count, rows, dtype=dtype, seed=3)
    expected = reference.linear(x, weight, bias)
    expected = expected + stream if adds else expected
    matrix = describe_matrix(weight)
    mine, out = np.zeros(projection_mine_bytes(matrix), np.uint8), stream.clone()
    units = projection_units(matrix, count)
    assert units > -(-count // VECTORS_AT_ONCE)
    size = dtype.itemsize
    for unit in range(units):
        place = (x.data_ptr(), columns * size, count, CODES[dtype], out.data_ptr(), rows * size)
        bias_address = 0 if bias is None else bias.data_ptr()
        project(matrix, bias_address, unit, *place, adds, mine.ctypes.data)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_references(dtype: torch.dtype, interleaved: bool) -> None:
    """Also where only a part of the head is rotated."""
    half, width = 7, 23
    heads = drawn(4, 1, width, dtype=dtype, seed=0)
    frequencies = 10000 ** -(torch.arange(half) / half)
    angles = torch.outer(torch.tensor([0.0, 1.0, 77.0, 5000.0]), frequencies)
    expected = reference.rope(heads, 1.5 * angles.cos(), 1.5 * angles.sin(), interleaved)
    for token, position in enumerate((0, 1, 77, 5000)):
        cos, sin = np.zeros(half, np.float32), np.zeros(half, np.float32)
        rope_angles(position, frequencies.numpy(), 1.5, cos, sin)
        values = heads[token, 0].float().numpy()
        rotate(values, half, cos, sin, interleaved, CODES[dtype])
        tolerance = 1e-3 if dtype == torch.float32 else TOLERANCE[dtype]
        torch.testing.assert_close(
            torch.from_numpy(values), expected[token, 0].float(), rtol=tolerance, atol=tolerance
        )
