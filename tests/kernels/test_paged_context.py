"""Writing KV into pages, and which pages and tokens a row's queries see."""

import pytest
import torch

from crosspool.kernels.reference.paged_context import visible_context, write_pages
from helpers_paged_kv import TOKENS_PER_PAGE, paged_rows

pytestmark = pytest.mark.backend


def test_write_touches_the_named_slots_and_nothing_else() -> None:
    arena = torch.zeros(4, 40)
    pages = arena[:, 10:34].view(4, 3, 2, 4)
    values = torch.arange(1.0, 25.0).view(3, 2, 4)
    write_pages(pages, values, torch.tensor([2, 0, 2]), torch.tensor([1, 2, 0]))
    assert torch.equal(pages[2, 1], values[0])
    assert torch.equal(pages[0, 2], values[1])
    assert torch.equal(pages[2, 0], values[2])
    assert arena.count_nonzero() == values.numel()


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 100])
@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (0, 5), (0, 13), (9, 1), (9, 2), (10, 1), (7, 6), (10, 10)]
)
def test_what_queries_see(first: int, count: int, window: int | None) -> None:
    rows = paged_rows([(3, 2), (first, count)], (2,))
    context = visible_context(rows.batch, 1, 1, TOKENS_PER_PAGE, window)
    gathered = context.gather(rows.pages)
    begin = 0 if window is None else max(0, first - window + 1)
    assert torch.equal(gathered, rows.contexts[1][begin:])
    assert len(context.pages) <= (first + count - begin) // TOKENS_PER_PAGE + 2
    for query in range(count):
        position = first + query
        seen = [key for key in range(begin, first + count) if key <= position]
        if window is not None:
            seen = [key for key in seen if key > position - window]
        mask = [True] * len(gathered) if context.mask is None else context.mask[query].tolist()
        assert [begin + index for index, visible in enumerate(mask) if visible] == seen
