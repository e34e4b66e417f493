"""What the tests of kernels rely on: the interpreter computes with narrow types as a GPU does."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from helpers_triton import DEVICE, INTERPRETED

pytestmark = pytest.mark.backend

NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@triton.jit
def convert(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def product(left, right, out, size: tl.constexpr):
    at = tl.arange(0, size)
    square = at[:, None] * size + at
    result = tl.dot(tl.load(left + square), tl.load(right + square), input_precision="ieee")
    tl.store(out + square, result)


@triton.jit
def twice(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    values = tl.load(source + at)
    tl.store(target + at, values + values)


@triton.jit
def total(source, target, count: tl.constexpr):
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, count))))


@triton.jit
def first_three(source, target):
    at = tl.arange(0, 4)
    tl.store(target + at, tl.load(source + at, mask=at < 3))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_conversions_round_to_nearest_even_and_back_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1024, generator=generator) * 10 ** torch.linspace(-6, 2.3, 1024)
    step = 2.0 ** -(7 if dtype is torch.bfloat16 else 10 if dtype is torch.float16 else 3)
    values[:4] = torch.tensor([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 0.0])
    expected = values.to(dtype)
    narrow, wide = torch.empty(1024, dtype=dtype, device=DEVICE), torch.empty(1024, device=DEVICE)
    convert[(1,)](values.to(DEVICE), narrow, 1024)
    convert[(1,)](narrow, wide, 1024)
    assert torch.equal(narrow.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(wide.cpu(), expected.float())


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_products_are_summed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32, device=DEVICE)
    product[(1,)](left.to(DEVICE), right.to(DEVICE), out, 32)
    torch.testing.assert_close(out.cpu(), left.float() @ right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel can compute with them")
@pytest.mark.parametrize("kernel", [twice, total])
def test_other_arithmetic_with_bfloat16_is_refused(kernel: triton.JITFunction) -> None:
    values = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="arithmetic with bf16: convert to float32 first"):
        kernel[(1,)](values, torch.empty_like(values), 16)


@pytest.mark.skipif(not INTERPRETED, reason="it may be anything on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_masked_load_leaves_out_is_not_a_number(dtype: torch.dtype) -> None:
    out = torch.zeros(4, dtype=dtype)
    first_three[(1,)](torch.ones(4, dtype=dtype), out)
    assert out[:3].eq(1).all()
    assert out[3].isnan()
