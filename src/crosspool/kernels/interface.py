"""What every implementation of the kernels offers: plain data for a pass, and the signature of each op.

Shapes: T queries of one pass (all rows of a micro-batch one after another), H hidden size, N query heads,
K key-value heads, D head size, P pages of the arena, S tokens per page. "Model dtype" is the storage type of
a model's weights, hidden states and KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the queries of one pass of one micro-batch stand, and where their KV is.

    ``positions`` is int64 [T]. Row r owns queries ``query_starts[r]:query_starts[r + 1]`` (one entry more
    than rows), the first of which is at absolute position ``first_positions[r]``; after this pass's KV is
    written its context is ``first_positions[r]`` plus its number of queries.
    ``page_tables[r][g]`` is int64 [chunks]: the page ids of layer group g, entry i for positions
    ``i * tokens_per_page`` onwards; -1 where the page fell out of the window and was given back.
    ``pages_written[g]`` and ``slots_written`` (int64 [T]) say into which page of group g, and at which token
    of it, each query's KV goes.
    """

    positions: Tensor
    query_starts: tuple[int, ...]
    first_positions: tuple[int, ...]
    page_tables: tuple[tuple[Tensor, ...], ...]
    pages_written: tuple[Tensor, ...]
    slots_written: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.first_positions)

    @property
    def longest_context(self) -> int:
        """Tokens of the row that has most, this pass's included."""
        counts = (end - start for start, end in pairwise(self.query_starts))
        return max(first + count for first, count in zip(self.first_positions, counts, strict=True))


class ExpertWeights(NamedTuple):
    """One gated FFN: ``gate`` and ``up`` [I, H], ``down`` [H, I]. Views need not be contiguous."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Linear(Protocol):
    """A product with weights. A row's result does not depend on the rows beside it, as far as the
    implementation can see to it: exactly in 16 bits, within rounding in float32."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``hidden`` [T, I], ``weight`` [O, I], ``bias`` [O] -> [T, O]."""
        ...


class RmsNorm(Protocol):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), computed in float32."""

    def __call__(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``hidden`` [..., H], ``weight`` [H], both in model dtype -> [..., H]."""
        ...


class Rope(Protocol):
    """Rotary position embedding (arXiv 2104.09864), computed in float32."""

    def __call__(self, heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Rotate the first R elements of each head; the others pass unchanged.

        ``heads`` [T, N, D] in model dtype; ``cos`` and ``sin`` float32 [T, R/2]. ``interleaved``: pairs are
        the neighbours (2i, 2i + 1), otherwise the halves (i, i + R/2). Returns [T, N, D].
        """
        ...


class WritePages(Protocol):
    """Append one pass's KV of one layer to its pages, in place."""

    def __call__(self, pages: Tensor, values: Tensor, page_ids: Tensor, slots: Tensor) -> None:
        """``pages`` [P, S, ...] in model dtype (a view of the arena), ``values`` [T, ...].

        Query t goes to ``pages[page_ids[t], slots[t]]``; both indices are int64 [T].
        """
        ...


class GqaAttention(Protocol):
    """Grouped-query attention of every row over its own pages. A row's result depends on no other row."""

    def __call__(
        self,
        query: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        batch: AttentionBatch,
        group: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """``query`` [T, N, D]; pages [P, S, K, D], already holding this pass's KV. Returns [T, N, D].

        ``group`` says whose page tables to read. A query at position p sees positions up to p, and with a
        window only the last ``window`` of them. Slots beyond a row's context are never read into the result.
        """
        ...


class MlaAttention(Protocol):
    """Multi-head latent attention (arXiv 2405.04434) in its absorbed form: latents are keys and values."""

    def __call__(
        self,
        query: Tensor,
        latent_pages: Tensor,
        latent_rank: int,
        batch: AttentionBatch,
        group: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """``query`` [T, N, rank + R]: the query carried into latent space, then its rotary part.

        ``latent_pages`` [P, S, rank + R]: normed latent, then the rotated key shared by all heads. Returns
        the attended latents [T, N, rank], which the caller takes out of latent space.
        """
        ...


class Router(Protocol):
    """Expert choice of every token, computed in float32."""

    def __call__(
        self,
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
        """``hidden`` [T, H], ``weight`` [E, H], ``selection_bias`` float32 [E] or None.

        ``scoring`` is "softmax" or "sigmoid", ``group_score`` "max" or "top2_sum"; the fields mean what
        they mean in RouterSpec. Returns expert ids int64 [T, top_k] and their weights float32 [T, top_k].
        """
        ...


class DenseFfn(Protocol):
    """A gated feed-forward network (arXiv 2002.05202): down(activation(gate(x)) * up(x))."""

    def __call__(self, hidden: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
        """``hidden`` [T, H] -> [T, H]. ``activation`` is its public name."""
        ...


class MoeFfn(Protocol):
    """Routed experts, and the shared one if there is one."""

    def __call__(
        self,
        hidden: Tensor,
        chosen: Tensor,
        chosen_weights: Tensor,
        experts: Sequence[ExpertWeights],
        shared: ExpertWeights | None,
        activation: str,
    ) -> Tensor:
        """``hidden`` [T, H], ``chosen`` and ``chosen_weights`` [T, top_k] as from Router -> [T, H].

        The results of a token's experts are added in float32, in the order of expert ids.
        """
        ...
