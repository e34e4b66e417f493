"""The compiled FFN half, against the plain torch reference and against itself in other company."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from crosspool.kernels import reference
from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.numba.activation import ACTIVATIONS
from crosspool.kernels.numba.ffn import ffn_half
from crosspool.kernels.numba.ffn_fields import Expert, describe_ffn, ffn_mine_bytes, ffn_room_bytes
from crosspool.kernels.numba.matrix import CODES, quantise
from crosspool.kernels.numba.router import describe_router
from crosspool.kernels.numba.team import SHARED_WORDS, new_own

pytestmark = pytest.mark.backend

RULES: dict[str, Any] = {
    "top_k": 3,
    "scoring": "softmax",
    "normalise": True,
    "scale": 1.5,
    "groups": 1,
    "top_groups": 1,
    "group_score": "max",
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def expert(hidden: int, width: int, dtype: torch.dtype, seed: int) -> ExpertWeights:
    return ExpertWeights(
        drawn(width, hidden, seed=seed).to(dtype) * 2,
        drawn(width, hidden, seed=seed + 1).to(dtype) * 2,
        drawn(hidden, width, seed=seed + 2).to(dtype) * 2,
    )


class Ffn:
    """An FFN and both ways to compute it."""

    def __init__(
        self, hidden: int, width: int, experts: int, shared: int, dtype: torch.dtype, activation: str = "silu"
    ) -> None:
        self.activation, self.dtype, self.hidden = activation, dtype, hidden
        self.experts = [expert(hidden, width, dtype, 10 * i) for i in range(max(1, experts))]
        self.shared = expert(hidden, shared, dtype, 7) if shared else None
        self.router = drawn(experts, hidden, seed=5).to(dtype) * hidden**0.5 if experts else None

    def inputs(self, count: int) -> torch.Tensor:
        return (drawn(count, self.hidden, seed=3) * self.hidden**0.5).to(self.dtype)

    def expected(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.router is None:
            return reference.dense_ffn(hidden, self.experts[0], self.activation)
        chosen, gains = reference.router(hidden, self.router, None, **RULES)
        return reference.moe_ffn(hidden, chosen, gains, self.experts, self.shared, self.activation)

    def fields(self) -> np.ndarray:
        router = None if self.router is None else describe_router(self.router, None, **RULES)
        shared = None if self.shared is None else Expert(*self.shared)
        return describe_ffn(self.activation, [Expert(*own) for own in self.experts], router, shared)


def computed(fields: np.ndarray, hidden: torch.Tensor, threads: int = 1) -> torch.Tensor:
    """NaN where the kernel wrote nothing. Scratch is as large as it says and full of rubbish."""
    count, out = len(hidden), torch.full_like(hidden, torch.nan)
    shared = np.zeros(SHARED_WORDS, np.int64)
    room = np.full(ffn_room_bytes(fields, count) + 64, 0xAB, np.uint8)
    mine = [np.full(ffn_mine_bytes(fields, count) + 64, 0xAB, np.uint8) for _ in range(threads)]

    def run(index: int) -> None:
        own, dtype = new_own(index, threads), CODES[hidden.dtype]
        scratch = (room.ctypes.data, mine[index].ctypes.data)
        ffn_half(shared.ctypes.data, own, fields, hidden.data_ptr(), count, dtype, *scratch, out.data_ptr())

    members = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert (room[-64:] == 0xAB).all()
    assert all((own[-64:] == 0xAB).all() for own in mine)
    return out


@pytest.mark.parametrize("count", [1, 2, 7, 130])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "width", "experts", "shared"),
    [(33, 19, 0, 0), (64, 200, 0, 0), (50, 31, 6, 0), (96, 24, 7, 45), (17, 90, 5, 10)],
)
def test_it_is_the_reference(
    hidden: int, width: int, experts: int, shared: int, dtype: torch.dtype, count: int
) -> None:
    ffn = Ffn(hidden, width, experts, shared, dtype)
    x = ffn.inputs(count)
    expected = ffn.expected(x).float()
    error = (computed(ffn.fields(), x).float() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    ffn = Ffn(40, 60, 0, 0, torch.float32, activation)
    torch.testing.assert_close(
        computed(ffn.fields(), ffn.inputs(9)), ffn.expected(ffn.inputs(9)), rtol=1e-5, atol=5e-6
    )


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_token_has_the_same_bits_in_any_company_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    ffn = Ffn(96, 70, 6, 33, dtype)
    fields, x = ffn.fields(), ffn.inputs(110)
    together = computed(fields, x)
    assert torch.equal(computed(fields, x, threads=3), together)
    for begin, end in ((0, 1), (1, 3), (3, 8), (8, 13), (50, 110)):
        assert torch.equal(computed(fields, x[begin:end], threads=2), together[begin:end])


def test_shards_add_up_to_the_whole() -> None:
    """Slices of the intermediate dimension, as views; one of them is empty."""
    ffn = Ffn(48, 20, 6, 33, torch.float32)
    assert ffn.shared is not None
    x, whole, cuts = ffn.inputs(5), ffn.expected(ffn.inputs(5)), (0, 0.4, 0.4, 1)
    total = torch.zeros_like(whole)
    for low, high in pairwise(cuts):

        def cut(own: ExpertWeights, low: float = low, high: float = high) -> Expert:
            part = slice(int(low * len(own.gate)), int(high * len(own.gate)))
            return Expert(own.gate[part], own.up[part], own.down[:, part])

        assert ffn.router is not None
        router = describe_router(ffn.router, None, **RULES)
        fields = describe_ffn("silu", [cut(own) for own in ffn.experts], router, cut(ffn.shared))
        total += computed(fields, x)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_int8_weights() -> None:
    ffn = Ffn(64, 80, 6, 0, torch.bfloat16)
    x = ffn.inputs(6)
    small = [Expert(*(quantise(weight) for weight in own)) for own in ffn.experts]
    assert ffn.router is not None
    router = describe_router(ffn.router, None, **RULES)
    ffn.experts = [
        ExpertWeights(*((w.values * w.scales.unsqueeze(1)).bfloat16() for w in own)) for own in small
    ]
    expected = ffn.expected(x).float()
    got = computed(describe_ffn("silu", small, router, None), x).float()
    assert (got - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_matrices_that_do_not_fit_are_refused() -> None:
    own = Expert(torch.ones(4, 6), torch.ones(4, 6), torch.ones(6, 5))
    with pytest.raises(ValueError, match="expert 0: gate, up and down do not fit"):
        describe_ffn("silu", [own], None, None)
    fitting = Expert(torch.ones(4, 6), torch.ones(4, 6), torch.ones(6, 4))
    with pytest.raises(ValueError, match="2 experts, and a router of 0"):
        describe_ffn("silu", [fitting] * 2, None, None)
