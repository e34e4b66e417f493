"""Matrix products with weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See interface.Linear.

    In 16 bits a lone row is computed as one of two: torch takes another path for a single row, which adds up
    in another order and so rounds differently, and a request's tokens would depend on whether it is alone.
    (On processors with a matrix unit torch rounds by the number of rows all the same.)
    """
    if len(hidden) == 1 and hidden.dtype != torch.float32:
        return functional.linear(hidden.expand(2, -1), weight, bias)[:1]
    return functional.linear(hidden, weight, bias)
