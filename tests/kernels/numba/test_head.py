"""The compiled head, against the plain torch reference and against itself in other company."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from crosspool.kernels import reference
from crosspool.kernels.numba.head import describe_head, head, head_mine_bytes, head_room_bytes
from crosspool.kernels.numba.matrix import CODES
from crosspool.kernels.numba.team import SHARED_WORDS, new_own

pytestmark = pytest.mark.backend


def computed(
    norm: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, queries: list[int], threads: int = 1
) -> torch.Tensor:
    fields = describe_head(norm, 1e-5, weight)
    logits = torch.full((len(queries), len(weight)), torch.nan)
    shared, wanted = np.zeros(SHARED_WORDS, np.int64), np.array(queries)
    room = np.full(head_room_bytes(hidden.shape[1], len(queries)), 0xAB, np.uint8)
    mine = [np.full(head_mine_bytes(hidden.shape[1]), 0xAB, np.uint8) for _ in range(threads)]

    def run(index: int) -> None:
        what = (fields, hidden.data_ptr(), wanted, len(queries), CODES[hidden.dtype])
        scratch = (room.ctypes.data, mine[index].ctypes.data)
        head(shared.ctypes.data, new_own(index, threads), *what, *scratch, logits.data_ptr())

    members = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    return logits


def model(dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((45,), (1031, 45), (tokens, 45))
    norm, weight, hidden = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return norm, weight, hidden


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_logits_are_those_of_the_reference_before_their_last_rounding(dtype: torch.dtype) -> None:
    norm, weight, hidden = model(dtype, 9)
    queries = [8, 0, 3]
    expected = reference.rms_norm(hidden[queries], norm, 1e-5).float() @ weight.float().T
    difference = computed(norm, weight, hidden, queries) - expected
    assert difference.abs().max() <= {torch.float32: 1e-5}.get(dtype, 2e-1)
    assert difference.abs().mean() <= {torch.float32: 1e-6}.get(dtype, 1e-3)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_query_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    norm, weight, hidden = model(dtype, 120)
    together = computed(norm, weight, hidden, list(range(120)), threads=3)
    for queries in ([0], [119, 5], [97, 96, 95, 1]):
        assert torch.equal(computed(norm, weight, hidden, queries), together[queries])
