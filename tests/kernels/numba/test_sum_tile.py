"""Weighted sums of value rows, against float64 and against themselves in other company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspool.kernels.numba.matrix import CODES
from crosspool.kernels.numba.sum_tile import add_weighted

pytestmark = pytest.mark.backend


def weighted(values: torch.Tensor, weights: torch.Tensor, begin: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """``values`` [R, W], ``weights`` [N, R], ``begin`` [N, W] -> [N, W], in two calls cut at row ``cut``."""
    out = torch.full((len(weights), values.shape[1] + 3), 7.0)
    out[:, :-3] = begin
    size, count, width = values.element_size(), len(values), values.shape[1]
    for first, last in ((0, cut), (cut, count)):
        add_weighted(
            values.data_ptr() + first * values.stride(0) * size,
            values.stride(0) * size,
            last - first,
            width,
            CODES[values.dtype],
            weights.data_ptr() + 4 * first,
            4 * weights.stride(0),
            len(weights),
            out.data_ptr(),
            4 * out.stride(0),
        )
    assert (out[:, -3:] == 7).all()
    return out[:, :-3]


def drawn(
    dtype: torch.dtype, rows: int, width: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width + heads)
    values = torch.full((rows, width + 5), np.nan).to(dtype)[:, :width]
    values[:] = torch.randn(rows, width, generator=generator)
    return (
        values,
        torch.rand(heads, rows, generator=generator),
        torch.randn(heads, width, generator=generator),
    )


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 17])
@pytest.mark.parametrize("width", [1, 9, 64, 80, 131])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_it_is_the_product(dtype: torch.dtype, width: int, heads: int) -> None:
    values, weights, begin = drawn(dtype, 37, width, heads)
    expected = begin.double() + weights.double() @ values.double()
    torch.testing.assert_close(weighted(values, weights, begin).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_sum_has_the_same_bits_in_any_company_and_however_rows_are_cut(dtype: torch.dtype) -> None:
    values, weights, begin = drawn(dtype, 41, 90, 17)
    together = weighted(values, weights, begin)
    for head in range(17):
        alone = weighted(values, weights[head : head + 1], begin[head : head + 1], cut=2 * head)
        assert torch.equal(alone[0], together[head])
