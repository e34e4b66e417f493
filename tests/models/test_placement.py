"""What becomes of a tensor: nothing, a copy, or int8."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
import torch

from crosspool.backends.weights_memory import HugeArena
from crosspool.kernels.numba.matrix import Int8Weight, quantise
from crosspool.models import placement
from crosspool.models.placement import WHOLE, InArena, InPlace

pytestmark = pytest.mark.backend

WEIGHT = torch.randn(37, 20, generator=torch.Generator().manual_seed(5)).bfloat16()


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_in_place_nothing_is_copied() -> None:
    place = InPlace()
    assert place.tensor(WEIGHT).data_ptr() == WEIGHT.data_ptr()
    part = place.matrix(WEIGHT, slice(3, 7))
    assert isinstance(part, torch.Tensor)
    assert part.data_ptr() == WEIGHT[:, 3:].data_ptr() and part.shape == (37, 4)


def test_copies_are_whole_rows_of_their_own(threads: Executor) -> None:
    place = InArena(HugeArena(), threads, int8=False)
    copy, part = place.tensor(WEIGHT), place.matrix(WEIGHT, slice(3, 7))
    place.finish()
    assert torch.equal(copy, WEIGHT) and copy.data_ptr() != WEIGHT.data_ptr()
    assert isinstance(part, torch.Tensor)
    assert torch.equal(part, WEIGHT[:, 3:7]) and part.is_contiguous()


@pytest.mark.parametrize("at_once", [1, 45, 1 << 16])
@pytest.mark.parametrize("columns", [WHOLE, slice(3, 7), slice(5, 5)])
def test_blocks_and_parts_are_quantised_as_the_whole(
    threads: Executor, monkeypatch: pytest.MonkeyPatch, at_once: int, columns: slice
) -> None:
    monkeypatch.setattr(placement, "_QUANTISED_AT_ONCE", at_once)
    place = InArena(HugeArena(), threads, int8=True)
    found, vector = place.matrix(WEIGHT, columns), place.tensor(WEIGHT)
    place.finish()
    whole = quantise(WEIGHT)
    assert isinstance(found, Int8Weight)
    assert torch.equal(found.values, whole.values[:, columns]) and torch.equal(found.scales, whole.scales)
    assert torch.equal(vector, WEIGHT), "only matrices are quantised"


def test_what_goes_wrong_in_a_thread_is_raised(threads: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(weight: torch.Tensor) -> Int8Weight:
        raise OSError("the disk is gone")

    monkeypatch.setattr(placement, "quantise", fails)
    place = InArena(HugeArena(), threads, int8=True)
    place.matrix(WEIGHT)
    with pytest.raises(OSError, match="the disk is gone"):
        place.finish()
    place.finish()
