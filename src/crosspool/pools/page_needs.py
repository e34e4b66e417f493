"""How many pages one sequence needs, and how long the longest one can be: arithmetic of a layout."""

from __future__ import annotations

from crosspool.core.kv_layout import KvLayout


def growing_pages(layout: KvLayout, tokens: int, step_tokens: int) -> int:
    """The most pages that a sequence holds while it grows to ``tokens`` tokens, up to ``step_tokens`` at a
    time (a prompt chunk): a window group holds up to that many tokens more than its window."""
    return _pages(layout, tokens, step_tokens)


def settled_pages(layout: KvLayout, tokens: int) -> int:
    """Pages that a sequence holds when it grows beyond ``tokens`` token by token."""
    return _pages(layout, tokens, 0)


def most_tokens(layout: KvLayout, pages: int, step_tokens: int) -> int:
    """The largest multiple of tokens_per_page to which a sequence of so many pages can grow."""
    unbounded = all(group.window is not None for group in layout.groups)
    low, high = 0, pages * (1 << 20 if unbounded else 1)
    while low < high:
        middle = (low + high + 1) // 2
        if growing_pages(layout, middle * layout.tokens_per_page, step_tokens) <= pages:
            low = middle
        else:
            high = middle - 1
    return low * layout.tokens_per_page


def _pages(layout: KvLayout, tokens: int, beyond_window: int) -> int:
    chunks = layout.chunks(tokens)
    return sum(
        chunks if group.window is None else min(chunks, layout.chunks(group.window + beyond_window) + 1)
        for group in layout.groups
    )
