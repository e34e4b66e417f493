"""Products of weight rows and vectors: right, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from crosspool.kernels.numba.linear import VECTORS_AT_ONCE, dot_rows, multiply_rows
from crosspool.kernels.numba.matrix import CODES, Int8Weight, describe_matrix, quantise

pytestmark = pytest.mark.backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 1),
    (3, 5, 2),
    (17, 70, 5),
    (8, 32, 3),
    (9, 97, 4),
    (35, 33, 16),
    (48, 64, 33),
    (64, 576, VECTORS_AT_ONCE + 7),
)
Multiply = Callable[..., torch.Tensor]


@pytest.fixture(params=[multiply_rows, dot_rows], ids=["as weights", "in small pieces"])
def multiply(request: pytest.FixtureRequest) -> Multiply:
    """Both ways to multiply; on processors with a matrix unit they differ in bfloat16."""
    return partial(products, request.param)


def products(
    kernel: Callable[..., None],
    weight: torch.Tensor | Int8Weight,
    vectors: torch.Tensor,
    first: int = 0,
    last: int | None = None,
) -> torch.Tensor:
    """float32 [vectors, rows]; NaN where the kernel wrote nothing."""
    matrix = describe_matrix(weight)
    last = matrix.rows if last is None else last
    out = torch.full((len(vectors), last - first), torch.nan)
    step = vectors.stride(0) * vectors.element_size()
    addresses = vectors.data_ptr() + step * np.arange(len(vectors), dtype=np.int64)
    stride = out.stride(0) * out.element_size()
    dtype = CODES[vectors.dtype]
    kernel(matrix, first, last, addresses, dtype, len(vectors), out.data_ptr(), stride)
    return out


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float64(
    multiply: Multiply, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, columns, count = shape
    weight, vectors = drawn(rows, columns, dtype, 0), drawn(count, columns, dtype, 1)
    expected = vectors.double() @ weight.double().T
    assert (multiply(weight, vectors) - expected).abs().max() <= 1e-6 * columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_rows_are_scaled(multiply: Multiply, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, count = shape
    weight = quantise(drawn(rows, columns, torch.float32, 0))
    vectors = drawn(count, columns, dtype, 1)
    expected = vectors.double() @ (weight.values.double() * weight.scales.double().unsqueeze(1)).T
    assert (multiply(weight, vectors) - expected).abs().max() <= 1e-6 * columns


def test_quantising_errs_by_half_a_step_at_most() -> None:
    weight = drawn(9, 33, torch.float32, 0)
    weight[4] = 0
    values, scales = quantise(weight)
    error = (values * scales.unsqueeze(1) - weight).abs()
    assert (error <= 0.5001 * scales.unsqueeze(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_depends_on_its_row_and_vector_alone(multiply: Multiply, dtype: torch.dtype) -> None:
    weight, vectors = drawn(37, 1234, dtype, 0), drawn(40, 1234, dtype, 1)
    together = multiply(weight, vectors)
    for count in range(1, len(vectors)):
        assert torch.equal(multiply(weight, vectors[:count]), together[:count])
    for first in range(37):
        assert torch.equal(multiply(weight, vectors, first, first + 1)[:, 0], together[:, first])


def test_rows_may_lie_apart(multiply: Multiply) -> None:
    whole = drawn(10, 100, torch.bfloat16, 0)
    vectors = drawn(4, 37, torch.bfloat16, 1)
    part = whole[:, 20:57]
    assert torch.equal(multiply(part, vectors), multiply(part.contiguous(), vectors))


def test_columns_that_lie_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="strides"):
        describe_matrix(drawn(4, 6, torch.float32, 0).T)


def test_nothing_is_read_beyond_a_row(multiply: Multiply) -> None:
    """A vector whose neighbours are NaN: a mask that let one through would show."""
    for columns in range(1, 70):
        room = torch.full((columns + 64,), torch.nan, dtype=torch.bfloat16)
        room[:columns] = 1
        row = room[None, :columns]
        assert multiply(row, row).item() == columns
        assert (multiply(row, row.expand(20, columns)) == columns).all()


@pytest.mark.parametrize("columns", [16385, 40000])
def test_rows_so_long_that_few_vectors_fit_the_cache(multiply: Multiply, columns: int) -> None:
    weight, vectors = drawn(18, columns, torch.bfloat16, 0), drawn(35, columns, torch.bfloat16, 1)
    expected = vectors.double() @ weight.double().T
    assert (multiply(weight, vectors) - expected).abs().max() <= 1e-6 * columns
