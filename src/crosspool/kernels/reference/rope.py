"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See interface.Rope."""
    rotary = 2 * cos.shape[-1]
    turned, rest = heads[..., :rotary].float(), heads[..., rotary:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned = pair.flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    turned = turned.to(heads.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
