"""Paged grouped-query attention against softmax written out head by head, query by query."""

import pytest
import torch
from torch import Tensor

from crosspool.kernels.reference import gqa_attention
from helpers_paged_kv import forget_outside_window, paged_rows

pytestmark = pytest.mark.backend

ROWS = [(0, 1), (0, 12), (10, 1), (13, 4), (4, 5)]
SCALE = 0.3


def by_hand(query: Tensor, keys: Tensor, values: Tensor, first: int, window: int | None) -> Tensor:
    """[T, N, D] over a row's own context [C, K, D], in float64."""
    heads_per_key = query.shape[1] // keys.shape[1]
    result = torch.empty_like(query, dtype=torch.float64)
    for index in range(len(query)):
        last = first + index
        begin = 0 if window is None else max(0, last - window + 1)
        for head in range(query.shape[1]):
            own_keys = keys[begin : last + 1, head // heads_per_key].double()
            own_values = values[begin : last + 1, head // heads_per_key].double()
            weights = (own_keys @ query[index, head].double() * SCALE).softmax(0)
            result[index, head] = weights @ own_values
    return result


@pytest.mark.parametrize("window", [None, 3, 5, 11])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (3, 3), (4, 1)])
def test_every_row_attends_to_its_own_context(heads: int, kv_heads: int, window: int | None) -> None:
    rows = paged_rows(ROWS, (2, kv_heads, 7))
    if window is not None:
        forget_outside_window(rows, window)
    query = torch.randn(rows.batch.query_starts[-1], heads, 7, generator=torch.Generator().manual_seed(1))
    attended = gqa_attention(query, rows.pages[:, :, 0], rows.pages[:, :, 1], rows.batch, 1, window, SCALE)
    for row, context in enumerate(rows.contexts):
        own = rows.queries(row)
        expected = by_hand(query[own], context[:, 0], context[:, 1], ROWS[row][0], window)
        torch.testing.assert_close(attended[own].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = paged_rows(ROWS, (2, 3, 8))
    query = torch.randn(rows.batch.query_starts[-1], 6, 8, generator=torch.Generator().manual_seed(1))
    keys, values = rows.pages[:, :, 0], rows.pages[:, :, 1]
    together = gqa_attention(query, keys, values, rows.batch, 1, None, SCALE)
    keys[rows.batch.page_tables[1][1]] = 1.0
    again = gqa_attention(query, keys, values, rows.batch, 1, None, SCALE)
    assert not torch.equal(together[rows.queries(1)], again[rows.queries(1)])
    for row in (0, 2, 3, 4):
        assert torch.equal(together[rows.queries(row)], again[rows.queries(row)])
