"""Drawn tensors, batches cut and their results compared, for the tests of compiled attention halves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from crosspool.kernels.interface import AttentionBatch
from helpers_paged_kv import TOKENS_PER_PAGE


def drawn(*shape: int, seed: int) -> Tensor:
    """float32 whose products with vectors of ones have variance 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


@dataclass(frozen=True)
class State:
    """What a pass changes: the residual stream [T, H] and the arena [P, elements of a page]."""

    hidden: Tensor
    arena: Tensor


def assert_near(computed: State, expected: State, tolerance: float) -> None:
    error = (computed.hidden.float() - expected.hidden.float()).abs().max()
    assert error <= tolerance * expected.hidden.float().abs().max()
    torch.testing.assert_close(
        computed.arena.float(), expected.arena.float(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal; what is not a number too."""
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def with_places(batch: AttentionBatch) -> AttentionBatch:
    """The batch with where its queries' KV goes in group 1."""
    pages = [
        batch.page_tables[row][1][batch.positions[start:end] // TOKENS_PER_PAGE]
        for row, (start, end) in enumerate(pairwise(batch.query_starts))
    ]
    return replace(
        batch,
        pages_written=(batch.pages_written[0], torch.cat(pages)),
        slots_written=batch.positions % TOKENS_PER_PAGE,
    )


def chunks_of(batch: AttentionBatch) -> Iterator[tuple[AttentionBatch, slice]]:
    """Every row alone, cut into chunks of one, two and more tokens, in order; and where each chunk is in the
    batch."""
    for row, (start, end) in enumerate(pairwise(batch.query_starts)):
        queries = end - start
        cuts = {0, 1, 2, queries // 2, queries - 1, queries} & set(range(queries + 1))
        for first, last in pairwise(sorted(cuts)):
            yield chunk_of(batch, row, first, last)


def chunk_of(batch: AttentionBatch, row: int, first: int, last: int) -> tuple[AttentionBatch, slice]:
    """A batch of queries ``first`` to ``last - 1`` of one row alone, and where they are in the batch."""
    part = slice(batch.query_starts[row] + first, batch.query_starts[row] + last)
    alone = replace(
        batch,
        positions=batch.positions[part],
        query_starts=(0, last - first),
        first_positions=(batch.first_positions[row] + first,),
        page_tables=(batch.page_tables[row],),
    )
    return alone, part
