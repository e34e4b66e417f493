"""How far a kernel's result may be from the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu.results import Figure, at_most

TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-3}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error(name: str, result: Tensor, expected: Tensor, dtype: torch.dtype) -> Figure:
    """The largest difference, relative to the largest expected value. What is not a number is no hit."""
    wanted = expected.double().cpu()
    difference = float((result.double().cpu() - wanted).abs().max() / wanted.abs().max())
    return at_most(f"{name}, {name_of(dtype)}: error", difference, "", TOLERANCES[dtype])


def misses(name: str, count: int) -> Figure:
    """How many of exact results differ; none may."""
    return at_most(f"{name}: that differ", count, "", 0)
