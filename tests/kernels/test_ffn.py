"""Dense FFN and mixture of experts against loops over tokens."""

import pytest
import torch
from torch import Tensor

from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.reference import ACTIVATIONS, dense_ffn, moe_ffn

pytestmark = pytest.mark.backend

HIDDEN, WIDTH = 6, 5


def expert(seed: int, width: int = WIDTH) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    return ExpertWeights(
        torch.randn(width, HIDDEN, generator=generator),
        torch.randn(width, HIDDEN, generator=generator),
        torch.randn(HIDDEN, width, generator=generator),
    )


def tokens(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense(activation: str) -> None:
    weights, hidden = expert(0), tokens(4)
    expected = torch.stack(
        [
            weights.down @ (ACTIVATIONS[activation](weights.gate @ token) * (weights.up @ token))
            for token in hidden
        ]
    )
    torch.testing.assert_close(dense_ffn(hidden, weights, activation), expected, atol=1e-5, rtol=1e-5)


def test_the_activations_are_the_public_ones() -> None:
    value = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(ACTIVATIONS["silu"](value), value * value.sigmoid())
    torch.testing.assert_close(ACTIVATIONS["gelu"](value), value * (1 + (value / 2**0.5).erf()) / 2)
    inner = (2 / torch.pi) ** 0.5 * (value + 0.044715 * value**3)
    torch.testing.assert_close(ACTIVATIONS["gelu_pytorch_tanh"](value), value * (1 + inner.tanh()) / 2)
    assert ACTIVATIONS["relu"](value).tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("shared", [None, expert(50, width=3)])
def test_mixture(count: int, shared: ExpertWeights | None) -> None:
    generator = torch.Generator().manual_seed(count)
    experts = [expert(seed) for seed in range(7)]
    hidden = tokens(count)
    chosen = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(count)])
    weights = torch.rand(count, 3, generator=generator)
    result = moe_ffn(hidden, chosen, weights, experts, shared, "silu")
    for index in range(count):
        token = hidden[index : index + 1]
        expected = sum(
            weight * dense_ffn(token, experts[choice], "silu")
            for choice, weight in zip(chosen[index].tolist(), weights[index], strict=True)
        )
        if shared is not None:
            expected = expected + dense_ffn(token, shared, "silu")
        torch.testing.assert_close(result[index : index + 1], expected, atol=1e-5, rtol=1e-5)


def test_experts_that_nobody_chose_are_not_read() -> None:
    unread = ExpertWeights(*(torch.full_like(weight, float("nan")) for weight in expert(0)))
    experts = [unread, expert(1), unread, expert(3), unread]
    result = moe_ffn(tokens(2), torch.tensor([[1, 3], [3, 1]]), torch.ones(2, 2), experts, None, "silu")
    assert result.isfinite().all()


def test_bfloat16_results_are_added_in_float32() -> None:
    """Of two equal experts at half weight each nothing is lost: the sum is one expert's result."""
    weights = ExpertWeights(*(weight.bfloat16() for weight in expert(0)))
    hidden = tokens(5).bfloat16()
    halves = moe_ffn(hidden, torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5), [weights] * 2, None, "silu")
    assert halves.dtype is torch.bfloat16
    assert torch.equal(halves, dense_ffn(hidden, weights, "silu"))
