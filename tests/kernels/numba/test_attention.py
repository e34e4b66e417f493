"""Compiled attention, against the plain torch reference and against itself in other company."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.numba.attention import attend, attend_split, attention_mine_bytes, attention_room_bytes
from crosspool.kernels.numba.attention_block import AttentionShape
from crosspool.kernels.numba.batch import KvPlace
from crosspool.kernels.numba.matrix import CODES
from helpers_paged_kv import TOKENS_PER_PAGE, PagedRows, forget_outside_window, paged_rows
from helpers_passes import on_a_team, pass_of

pytestmark = pytest.mark.backend

ROWS = [(0, 1), (700, 1), (0, 12), (250, 20), (255, 1), (1023, 3), (511, 2)]
SCALE = 0.3
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


class Case:
    """Rows, pages and queries. ``rank``: of latents so many elements are the value; 0: key-value heads."""

    def __init__(self, dtype: torch.dtype, heads: int, kv_heads: int, width: int, rank: int = 0) -> None:
        self.dtype, self.heads, self.width, self.rank = dtype, heads, width, rank
        self.rows = paged_rows(ROWS, (width,) if rank else (2, kv_heads, width))
        self.pages = self.rows.pages.to(dtype)
        total = self.rows.batch.query_starts[-1]
        self.query = torch.randn(total, heads, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        size = self.pages.element_size()
        self.shape = AttentionShape(
            heads=heads,
            kv_heads=kv_heads,
            key_width=width,
            value_width=rank or width,
            value_offset=0 if rank else kv_heads * width * size,
            token_bytes=self.pages[0, 0].numel() * size,
            head_bytes=width * size,
            scale=SCALE,
        )

    def expected(self, window: int | None) -> Tensor:
        batch = self.rows.batch
        if self.rank:
            return reference.mla_attention(self.query, self.pages, self.rank, batch, 1, window, SCALE)
        keys, values = self.pages.unbind(2)
        return reference.gqa_attention(self.query, keys, values, batch, 1, window, SCALE)

    def computed(self, batch: AttentionBatch, query: Tensor, window: int | None, threads: int = 1) -> Tensor:
        seen, kv = pass_of(batch, self.dtype), self.place(window)
        out = torch.full((*query.shape[:2], self.shape.value_width), torch.nan, dtype=self.dtype)
        places = (query.data_ptr(), out.data_ptr())

        def run(shared: int, own: np.ndarray, room: int, mine: int) -> None:
            attend(shared, own, self.shape, seen, kv, places[0], room, mine, places[1])
            for t in range(int(own[0]), len(query), threads):
                for head in range(self.heads):
                    attend_split(self.shape, seen, kv, t, head, room, mine, places[1])

        sizes = attention_room_bytes(self.shape), attention_mine_bytes(self.shape, seen.rows)
        on_a_team(run, threads, *sizes)
        return out

    def place(self, window: int | None) -> KvPlace:
        page_bytes = self.pages.stride(0) * self.pages.element_size()
        return KvPlace(self.pages.data_ptr(), page_bytes, 0, TOKENS_PER_PAGE, 1, window or 0)


CASES = {"latent": (3, 1, 13, 9), "wide latent": (50, 1, 80, 64), "grouped": (6, 2, 40), "single": (3, 3, 17)}


@pytest.mark.parametrize("window", [None, 6, 300])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_it_is_the_reference(dtype: torch.dtype, case: tuple[int, ...], window: int | None) -> None:
    own = Case(dtype, *case)
    if window is not None:
        forget_outside_window(own.rows, window)
    expected = own.expected(window).float()
    computed = own.computed(own.rows.batch, own.query, window, threads=2).float()
    assert (computed - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def cut(rows: PagedRows, row: int, first: int, last: int) -> tuple[AttentionBatch, slice]:
    """A batch of queries ``first`` to ``last - 1`` of one row alone, and where they are in the whole."""
    batch = rows.batch
    whole = slice(batch.query_starts[row] + first, batch.query_starts[row] + last)
    alone = replace(
        batch,
        positions=batch.positions[whole],
        query_starts=(0, last - first),
        first_positions=(batch.first_positions[row] + first,),
        page_tables=(batch.page_tables[row],),
    )
    return alone, whole


@pytest.mark.parametrize("window", [None, 261])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_query_has_the_same_bits_in_any_company(
    dtype: torch.dtype, case: tuple[int, ...], window: int | None
) -> None:
    """Alone (its blocks side by side), in chunks (its blocks in order), on any number of threads."""
    own = Case(dtype, *case)
    together = own.computed(own.rows.batch, own.query, window)
    assert torch.equal(own.computed(own.rows.batch, own.query, window, threads=3), together)
    for row, (_, queries) in enumerate(ROWS):
        for first, last in pairwise(
            sorted({0, 1, queries // 2, queries - 9, queries} & set(range(queries + 1)))
        ):
            alone, whole = cut(own.rows, row, first, last)
            computed = own.computed(alone, own.query[whole].contiguous(), window, threads=2)
            assert torch.equal(computed, together[whole])


def test_scores_too_large_for_their_exponentials() -> None:
    own = Case(torch.float32, 6, 2, 40)
    own.query *= 1000
    computed = own.computed(own.rows.batch, own.query, None)
    torch.testing.assert_close(computed, own.expected(None), rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_shows_in_the_queries_that_see_it_only() -> None:
    own = Case(torch.float32, 6, 2, 40)
    table = own.rows.batch.page_tables[3][1]
    own.pages[table[260 // TOKENS_PER_PAGE], 260 % TOKENS_PER_PAGE, 0] = torch.nan
    computed = own.computed(own.rows.batch, own.query, None).isnan().flatten(1)
    start = own.rows.batch.query_starts[3]
    assert computed[start + 10 : start + 20].all()
    assert computed.any(1).sum() == 10
