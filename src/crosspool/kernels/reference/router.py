"""Expert choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid}
)
EXPERTS_THAT_RANK = MappingProxyType({"max": 1, "top2_sum": 2})
"""How many of a group's best experts are added up to rank the group."""


def router(
    hidden: Tensor,
    weight: Tensor,
    selection_bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    normalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """See interface.Router. The bias decides who is chosen and never enters the weights.

    Logits are added up in float64: in float32 their last bits would depend on how many rows there are, and
    through the experts' weights so would a request's tokens.
    """
    logits = functional.linear(hidden.double(), weight.double()).float()
    scores = SCORES[scoring](logits)
    ranked = scores if selection_bias is None else scores + selection_bias
    if groups > 1:
        ranked = _keep_best_groups(ranked, groups, top_groups, group_score)
    chosen = ranked.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return chosen, weights * scale


def _keep_best_groups(ranked: Tensor, groups: int, top_groups: int, group_score: str) -> Tensor:
    """Experts outside each token's best groups (arXiv 2405.04434) fall to minus infinity."""
    grouped = ranked.view(len(ranked), groups, -1)
    best = grouped.topk(EXPERTS_THAT_RANK[group_score], dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept.scatter_(-1, best.topk(top_groups, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
