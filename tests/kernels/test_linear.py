"""Products with weights, alone and in company."""

from __future__ import annotations

import pytest
import torch

from crosspool.kernels.numba.compile import cpu_features
from crosspool.kernels.reference import linear

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_the_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator).to(dtype)
    bias = torch.randn(7, generator=generator).to(dtype)
    for rows in (1, 2, 3):
        hidden = torch.randn(rows, 5, generator=generator).to(dtype)
        expected = hidden.double() @ weight.double().T + bias.double()
        torch.testing.assert_close(linear(hidden, weight, bias).double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif("amx-bf16" in cpu_features(), reason="torch's matrix unit products depend on the rows")
def test_in_16_bits_a_row_is_the_same_alone_and_in_any_company() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(576, 1536, generator=generator) * 0.05).bfloat16()
    hidden = torch.randn(256, 1536, generator=generator).bfloat16()
    together = linear(hidden, weight)
    alone = torch.cat([linear(row, weight) for row in hidden.split(1)])
    assert torch.equal(alone, together), "few rows round otherwise, so all of them are tried"
    for count in (2, 5, 16):
        for begin in range(0, 256, 16):
            rows = slice(begin, begin + count)
            assert torch.equal(linear(hidden[rows], weight), together[rows])
