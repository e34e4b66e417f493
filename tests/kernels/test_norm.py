"""RMS norm against its definition in float64, and the order of rounding in bfloat16."""

import pytest
import torch

from crosspool.kernels.reference import rms_norm

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 7)])
def test_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator)
    weight = torch.randn(shape[-1], generator=generator)
    wide = hidden.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(rms_norm(hidden, weight, 0.1).double(), expected, atol=1e-6, rtol=1e-6)


def test_a_zero_vector_stays_zero() -> None:
    assert rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6).abs().sum() == 0


def test_bfloat16_is_normed_in_float32_and_rounded_before_the_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = (100 * torch.randn(4, 64, generator=generator)).bfloat16()
    weight = torch.randn(64, generator=generator).bfloat16()
    normed = rms_norm(hidden.float(), torch.ones(64), 1e-6).bfloat16()
    assert torch.equal(rms_norm(hidden, weight, 1e-6), weight * normed)
