"""Rotary embedding as what it is: a rotation of pairs in the complex plane."""

import pytest
import torch
from torch import Tensor

from crosspool.kernels.reference import rope

pytestmark = pytest.mark.backend

QUERIES, HEADS = 5, 3


def angles(dim: int) -> Tensor:
    return torch.randn(QUERIES, dim // 2, generator=torch.Generator().manual_seed(0)) * 3


def heads(dim: int) -> Tensor:
    return torch.randn(QUERIES, HEADS, dim, generator=torch.Generator().manual_seed(1))


def test_neighbours_turn_as_complex_numbers() -> None:
    values, turn = heads(6), angles(6)
    pairs = torch.view_as_complex(values.view(QUERIES, HEADS, 3, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn).unsqueeze(1)).flatten(-2)
    torch.testing.assert_close(rope(values, turn.cos(), turn.sin(), True), expected)


def test_halves_are_neighbours_in_another_order() -> None:
    values, turn = heads(6), angles(6)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    expected = rope(values[..., order], turn.cos(), turn.sin(), True)
    torch.testing.assert_close(rope(values, turn.cos(), turn.sin(), False)[..., order], expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rest_of_a_head_passes_unchanged(interleaved: bool) -> None:
    values, turn = heads(10), angles(6)
    turned = rope(values, turn.cos(), turn.sin(), interleaved)
    assert torch.equal(turned[..., 6:], values[..., 6:])
    torch.testing.assert_close(turned[..., :6], rope(values[..., :6], turn.cos(), turn.sin(), interleaved))


def test_bfloat16_is_turned_in_float32() -> None:
    values, turn = heads(6).bfloat16(), angles(6)
    turned = rope(values, turn.cos(), turn.sin(), False)
    assert turned.dtype is torch.bfloat16
    assert torch.equal(turned, rope(values.float(), turn.cos(), turn.sin(), False).bfloat16())
