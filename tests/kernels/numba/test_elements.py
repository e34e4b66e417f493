"""Storage types: every 16-bit pattern and hard roundings, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspool.kernels.numba.elements import narrow, round_to, widen
from crosspool.kernels.numba.matrix import CODES

pytestmark = pytest.mark.backend

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_every_pattern_is_widened_and_narrowed_back(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = np.empty(2**16, np.float32)
    widen(patterns.data_ptr(), CODES[dtype], 2**16, wide)
    torch.testing.assert_close(torch.from_numpy(wide), patterns.float(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty_like(patterns)
    narrow(wide, 2**16, back.data_ptr(), CODES[dtype])
    torch.testing.assert_close(back, patterns, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0))
    halfway = (bits & ~0xFFFF) | 0x8000
    values = torch.cat((bits, halfway)).to(torch.int32).view(torch.float32)
    expected = values.to(dtype).float()
    rounded = values.clone().numpy()
    round_to(rounded, len(rounded), CODES[dtype])
    torch.testing.assert_close(torch.from_numpy(rounded), expected, rtol=0, atol=0, equal_nan=True)


def test_float32_is_left_as_it_is() -> None:
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    out, kept = np.empty_like(values), values.copy()
    widen(values.ctypes.data, CODES[torch.float32], 100, out)
    round_to(out, 100, CODES[torch.float32])
    narrow(out, 100, values.ctypes.data, CODES[torch.float32])
    assert (values == kept).all()
    assert (out == kept).all()
