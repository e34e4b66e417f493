"""The gates themselves: they let good kernels through, and no others."""

from __future__ import annotations

import pytest
import torch

from helpers_triton_bad_kernels import doubled, gram
from helpers_triton_gates import (
    ALL_TARGETS,
    GFX942,
    SM_90,
    Target,
    assert_builds_well,
    needs_interpreter,
    recorded,
)

pytestmark = [pytest.mark.backend, needs_interpreter]

OUT = torch.empty(2048)
HALVES = torch.empty(256 * 256, dtype=torch.float16)


@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
def test_a_good_kernel_passes(target: Target) -> None:
    assert_builds_well(lambda: doubled[(1,)](2**40, OUT, HINTED=True), target)


def test_narrow_loads_are_found() -> None:
    """Of NVIDIA's chips: AMD's load 128 bits from any multiple of 4 bytes."""
    address = 2**40 + 1
    with pytest.raises(AssertionError, match="loads nothing in 128 bits"):
        assert_builds_well(lambda: doubled[(1,)](address, OUT, HINTED=False), SM_90)
    assert_builds_well(lambda: doubled[(1,)](address, OUT, HINTED=False), SM_90, wide_loads=False)


@pytest.mark.parametrize(("target", "size"), [(SM_90, 128), (GFX942, 256)], ids=str)
def test_spills_are_found(target: Target, size: int) -> None:
    with pytest.raises(AssertionError, match="spills"):
        assert_builds_well(lambda: gram[(1,)](HALVES, HALVES, size, 32, num_warps=1), target)


def test_too_much_shared_memory_is_found() -> None:
    with pytest.raises(AssertionError, match="wants more than"):
        assert_builds_well(lambda: gram[(1,)](HALVES, HALVES, 128, 1024, num_warps=8), SM_90)


def test_launches_are_recorded_as_triton_specialises_them() -> None:
    with recorded() as launches:
        doubled[(1,)](48, OUT, HINTED=True, num_warps=2)
        doubled[(1,)](2**40 + 1, OUT[1:], False)
        doubled[(1,)](1, OUT, HINTED=True)
    assert [launch.signature["address"] for launch in launches] == ["i32", "i64", "constexpr"]
    assert [launch.aligned for launch in launches] == [("address", "out"), (), ("out",)]
    assert [launch.constants for launch in launches] == [
        {"HINTED": True},
        {"HINTED": False},
        {"address": 1, "HINTED": True},
    ]
    assert launches[0].options == {"num_warps": 2}
    assert launches[0].signature["out"] == "*fp32"


def test_a_launcher_that_launches_nothing_is_found() -> None:
    with pytest.raises(AssertionError, match="nothing was launched"):
        assert_builds_well(lambda: None, SM_90)
