"""The pages of one KV device: a free list and a reference count each."""

from __future__ import annotations

from collections.abc import Iterable

from crosspool.core.errors import InvariantError
from crosspool.core.ids import PageId


class PageAllocator:
    """Hands out equal pages of one arena. A page belongs to no model.

    A page is free, or held by at least one table. Pages given back last are given out first, because their
    memory is most likely still mapped and in cache.
    """

    def __init__(self, num_pages: int) -> None:
        self.total = num_pages
        self._free = [PageId(page) for page in range(num_pages - 1, -1, -1)]
        self._references = [0] * num_pages

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[PageId] | None:
        """``count`` pages with one reference each, or None (and nothing taken) if there are not so many."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Iterable[PageId]) -> None:
        """One more reference to each page. Raises InvariantError for a page that nobody holds."""
        for page in pages:
            if self._references[page] < 1:
                raise InvariantError(f"page {page} is shared but nobody holds it")
            self._references[page] += 1

    def release(self, pages: Iterable[PageId]) -> None:
        """One reference fewer; a page without any is free at once for any model.

        Raises InvariantError for a page that nobody holds.
        """
        references, free = self._references, self._free
        for page in pages:
            left = references[page] - 1
            if left < 0:
                raise InvariantError(f"page {page} is released but nobody holds it")
            references[page] = left
            if left == 0:
                free.append(page)

    def check(self, held: Iterable[PageId]) -> None:
        """Raise InvariantError unless ``held`` (repeats for shared pages) and the free list are all pages."""
        counts = [0] * self.total
        for page in held:
            counts[page] += 1
        if counts != self._references:
            wrong = next(page for page in range(self.total) if counts[page] != self._references[page])
            raise InvariantError(
                f"page {wrong} is in {counts[wrong]} tables but has {self._references[wrong]} references"
            )
        if len(set(self._free)) != len(self._free) or any(self._references[page] for page in self._free):
            raise InvariantError("the free list holds a page twice, or one that is in use")
        in_use = sum(1 for references in self._references if references)
        if in_use + len(self._free) != self.total:
            raise InvariantError(f"{self.total} pages, but {in_use} in use and {len(self._free)} free")
