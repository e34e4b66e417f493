"""Absorbed latent attention against expanding every key and value, as the paper defines it."""

import pytest
import torch

from crosspool.kernels.reference import mla_attention
from helpers_paged_kv import forget_outside_window, paged_rows

pytestmark = pytest.mark.backend

ROWS = [(0, 1), (0, 12), (10, 1), (13, 4)]
HEADS, RANK, ROTARY, NOPE, VALUE = 3, 9, 4, 6, 5
SCALE = 0.3


@pytest.mark.parametrize("window", [None, 6])
def test_absorbed_equals_expanded(window: int | None) -> None:
    rows = paged_rows(ROWS, (RANK + ROTARY,))
    if window is not None:
        forget_outside_window(rows, window)
    generator = torch.Generator().manual_seed(1)
    total = rows.batch.query_starts[-1]
    query_nope = torch.randn(total, HEADS, NOPE, generator=generator)
    query_rotary = torch.randn(total, HEADS, ROTARY, generator=generator)
    to_keys = torch.randn(HEADS, NOPE, RANK, generator=generator)
    to_values = torch.randn(HEADS, VALUE, RANK, generator=generator)

    in_latent_space = torch.einsum("thn,hnr->thr", query_nope, to_keys)
    query = torch.cat((in_latent_space, query_rotary), dim=-1)
    latents = mla_attention(query, rows.pages, RANK, rows.batch, 1, window, SCALE)
    attended = torch.einsum("thr,hvr->thv", latents, to_values)

    for row, context in enumerate(rows.contexts):
        latent, rotary_key = context[:, :RANK], context[:, RANK:]
        keys = torch.einsum("cr,hnr->chn", latent, to_keys)
        values = torch.einsum("cr,hvr->chv", latent, to_values)
        for index in range(rows.batch.query_starts[row], rows.batch.query_starts[row + 1]):
            last = int(rows.batch.positions[index])
            seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
            scores = torch.einsum("chn,hn->hc", keys[seen], query_nope[index])
            scores = scores + query_rotary[index] @ rotary_key[seen].T
            weights = (scores * SCALE).softmax(-1)
            expected = torch.einsum("hc,chv->hv", weights, values[seen])
            torch.testing.assert_close(attended[index], expected, atol=1e-4, rtol=1e-4)
