"""Rows whose queries attend to contexts in pages: what kernels make of them, and what the reference does."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.reference import gqa_attention, mla_attention
from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.batch import Pass
from helpers_triton import DEVICE
from helpers_triton_lanes import Arena, ModelWords, lane_of

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest value of a context, about 4."""

GQA_SHAPES = {
    "groups of 3": AttentionShape(6, 2, 16, 0, 0.3),
    "groups of 8": AttentionShape(8, 1, 80, 0, 0.1),
    "no groups": AttentionShape(3, 3, 13, 0, 0.25),
    "groups of 40": AttentionShape(40, 1, 16, 0, 0.25),
}
MLA_SHAPES = {
    "narrow": AttentionShape(3, 1, 19, 6, 0.3),
    "wide": AttentionShape(36, 1, 64, 16, 0.12),
}


class Rows:
    """Rows of (first position, queries), their contexts in pages, and their queries [T, N, key width]."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        shape: AttentionShape,
        dtype: torch.dtype,
        tokens_per_page: int = 17,
        window: int = 0,
        seed: int = 0,
    ) -> None:
        self.rows, self.shape, self.dtype, self.window = rows, shape, dtype, window
        latent = shape.rotary > 0
        inside = (1, shape.key_width) if latent else (2, shape.kv_heads, shape.width)
        self.arena = Arena([first + count for first, count in rows], inside, tokens_per_page, dtype, seed)
        if window:
            for row, (first, _) in enumerate(rows):
                self.arena.forget_outside_window(row, first, window)
        self.starts = [0, *accumulate(count for _, count in rows)]
        generator = torch.Generator().manual_seed(seed + 1)
        query = 4 * torch.randn(self.starts[-1], shape.heads, shape.key_width, generator=generator)
        self.query = query.to(dtype)

    def queries(self, row: int) -> slice:
        return slice(self.starts[row], self.starts[row + 1])

    def batch(self, spare_rows: int = 1, spare_queries: int = 2) -> Pass:
        return lane_of(ModelWords([{}]), self.rows, self.arena.pages, spare_rows, spare_queries)

    def room(self) -> tuple[Tensor, Tensor]:
        """Queries on the device, and room for results, both with two queries to spare."""
        spare = torch.full((2, *self.query.shape[1:]), torch.nan, dtype=self.dtype)
        out = torch.full((len(self.query) + 2, self.shape.heads, self.shape.width), 7, dtype=self.dtype)
        return torch.cat((self.query, spare)).to(DEVICE), out.to(DEVICE)

    def alone(self, row: int, begin: int = 0, end: int | None = None) -> Rows:
        """Queries ``begin`` to ``end - 1`` of one row, in the same arena."""
        first, count = self.rows[row]
        end = count if end is None else end
        other = object.__new__(Rows)
        other.__dict__ = self.__dict__ | {"rows": [(first + begin, end - begin)], "starts": [0, end - begin]}
        other.query = self.query[self.queries(row)][begin:end]
        other.arena = object.__new__(Arena)
        other.arena.__dict__ = self.arena.__dict__ | {"pages": self.arena.pages[row : row + 1]}
        return other

    def expected(self) -> Tensor:
        """By the reference, in float32 from the same inputs."""
        tables = tuple((row[0].long(), row[1].long()) for row in self.arena.pages)
        positions = [torch.arange(first, first + count) for first, count in self.rows]
        empty = torch.empty(0, dtype=torch.int64)
        batch = AttentionBatch(
            positions=torch.cat(positions),
            query_starts=tuple(self.starts),
            first_positions=tuple(first for first, _ in self.rows),
            page_tables=tables,
            pages_written=(empty, empty),
            slots_written=empty,
        )
        query, tokens = self.query.float(), self.arena.tokens().cpu().float()
        window = self.window or None
        if self.shape.rotary:
            latents = tokens[:, :, 0]
            return mla_attention(query, latents, self.shape.width, batch, 1, window, self.shape.scale)
        return gqa_attention(query, tokens[:, :, 0], tokens[:, :, 1], batch, 1, window, self.shape.scale)

    def assert_near(self, attended: Tensor) -> None:
        """Results of the pass's queries are the reference's, and no other was written."""
        count = len(self.query)
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(
            attended[:count].float().cpu(), self.expected(), rtol=tolerance, atol=4 * tolerance
        )
        assert attended[count:].eq(7).all()
