"""Weights in 8 bits, there and back."""

from __future__ import annotations

import pytest
import torch

from crosspool.kernels.float8 import dequantise_fp8, quantise_fp8

pytestmark = pytest.mark.backend


def test_each_number_comes_back_as_exactly_as_three_bits_of_fraction_can_say() -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1e-6, 1.0, 1e4]).repeat_interleave(100)[:290]
    weight = torch.randn(2, 130, 290, generator=generator) * size
    numbers, scales = quantise_fp8(weight.bfloat16())
    assert numbers.dtype is torch.float8_e4m3fn
    assert numbers.shape == weight.shape
    assert scales.shape == (2, 2, 3)
    back = dequantise_fp8(numbers, scales)
    smallest_normal = 2.0**-6 * scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[:, :130, :290]
    error = (back - weight.bfloat16().float()).abs()
    assert (error <= 2.0**-4 * weight.bfloat16().float().abs().maximum(smallest_normal) * 1.0001).all()


def test_the_largest_of_a_block_uses_the_range_and_others_do_not_matter() -> None:
    weight = torch.zeros(256, 128)
    weight[3, 5], weight[200, 100] = -896.0, 1.0
    numbers, scales = quantise_fp8(weight)
    assert scales.tolist() == [[2.0], [pytest.approx(1 / 448)]]
    assert numbers[3, 5] == -448
    assert torch.equal(dequantise_fp8(numbers, scales), weight)


def test_zeros_stay_zeros() -> None:
    numbers, scales = quantise_fp8(torch.zeros(3, 5))
    assert dequantise_fp8(numbers, scales).eq(0).all()


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights \[2, 3\] hold 1 that are not finite"):
        quantise_fp8(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("inf"), 3.0]]))
