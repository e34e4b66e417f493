"""Section 1: every launcher of kernels/triton against kernels/reference, on random inputs at real and at odd
geometries. Errors are relative to the largest value that is expected."""

from __future__ import annotations

from gpu import kernels_attention, kernels_choice, kernels_products
from gpu.device import Gpu
from gpu.results import Case


def cases(gpu: Gpu) -> list[Case]:
    made = [*kernels_products.cases(gpu), *kernels_attention.cases(gpu), *kernels_choice.cases(gpu)]
    # What models are served in comes first, should time be short.
    return sorted(made, key=lambda case: ("float32" in case.name, "odd" in case.name))
