"""The compiled norm, against the plain torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspool.kernels import reference
from crosspool.kernels.numba.matrix import CODES
from crosspool.kernels.numba.norm import LANES, rms_norm

pytestmark = pytest.mark.backend

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 16, 33, 576])
def test_it_is_the_reference(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = (3 * torch.randn(count, generator=generator)).to(dtype)
    weight = torch.randn(count, generator=generator).to(dtype)
    expected = reference.rms_norm(hidden, weight, 1e-5).float()
    values, room = hidden.float().numpy(), np.full(count + LANES, np.nan, np.float32)
    rms_norm(values, count, weight.data_ptr(), 1e-5, CODES[dtype], room)
    torch.testing.assert_close(torch.from_numpy(values), expected, rtol=TOLERANCE[dtype], atol=0)


def test_epsilon_counts() -> None:
    values, weight = np.full(20, 1e-3, np.float32), torch.ones(20)
    rms_norm(values, 20, weight.data_ptr(), 3e-6, CODES[torch.float32], np.empty(20 + LANES, np.float32))
    assert values == pytest.approx(0.5)
