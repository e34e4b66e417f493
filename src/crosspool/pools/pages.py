"""The pages of the KV pool: a free list for each device, and a reference count for each page."""

from __future__ import annotations

from collections.abc import Iterable

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import KvDevice, PageId


class PageAllocator:
    """Hands out equal pages, ``counts`` of them on each KV device. A page belongs to no model.

    A page is free, or somebody refers to it: page tables, and the prefix cache. Pages given back last are
    given out first, because their memory is most likely still mapped and in cache. ``free`` counts those of
    all devices.
    """

    def __init__(self, *counts: int) -> None:
        self.places = DevicePages.of(counts)
        self._free = [
            [PageId(page) for page in reversed(self.places.pages_of(device))]
            for device in self.places.devices
        ]
        self._references = [0] * self.places.total
        self.total = self.free = self.places.total

    def free_on(self, device: KvDevice) -> int:
        return len(self._free[device])

    def references(self, page: PageId) -> int:
        return self._references[page]

    def allocate(self, count: int, home: KvDevice, *, spread: bool = True) -> list[PageId] | None:
        """``count`` pages with one reference each, or None (and nothing taken) if there are not so many.

        They are of device ``home``; with ``spread``, what it lacks is of the others, from that with most
        free pages on.
        """
        if count > (self.free if spread else self.free_on(home)):
            return None
        pages = self._take(home, count)
        while len(pages) < count:
            fullest = max(self.places.devices, key=self.free_on)
            pages += self._take(fullest, count - len(pages))
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
        references, only = self._references, self._free[0] if len(self._free) == 1 else None
        for page in pages:
            left = references[page] - 1
            if left < 0:
                raise InvariantError(f"page {page} is released but nobody holds it")
            references[page] = left
            if left == 0:
                free = self._free[self.places.device_of(page)] if only is None else only
                free.append(page)
                self.free += 1

    def check(self, held: Iterable[PageId]) -> None:
        """Raise InvariantError unless ``held`` (repeats for shared pages) and the free lists are all pages,
        each free one in its device's list."""
        counts = [0] * self.total
        for page in held:
            counts[page] += 1
        if counts != self._references:
            wrong = next(page for page in range(self.total) if counts[page] != self._references[page])
            raise InvariantError(
                f"page {wrong} is in {counts[wrong]} tables but has {self._references[wrong]} references"
            )
        for device in self.places.devices:
            self._check_device(device)
        if self.free != sum(map(len, self._free)):
            raise InvariantError(f"{sum(map(len, self._free))} pages are free, but {self.free} were counted")

    def _check_device(self, device: KvDevice) -> None:
        pages, free = self.places.pages_of(device), self._free[device]
        if len(set(free)) != len(free) or any(self._references[page] for page in free):
            raise InvariantError(f"the free list of KV device {device} holds a page twice, or one in use")
        in_use = sum(1 for page in pages if self._references[page])
        if in_use + len(free) != len(pages) or not all(page in pages for page in free):
            raise InvariantError(
                f"KV device {device} has {len(pages)} pages, but {in_use} are in use and {len(free)} are free"
            )

    def _take(self, device: KvDevice, count: int) -> list[PageId]:
        """Up to ``count`` of a device's free pages."""
        free = self._free[device]
        begin = max(0, len(free) - count)
        pages = free[begin:]
        del free[begin:]
        self.free -= len(pages)
        return pages
