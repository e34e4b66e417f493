"""One sequence's pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from crosspool.core.ids import NULL_PAGE, KvDevice, ModelIndex, PageId
from crosspool.core.kv_layout import KvLayout
from crosspool.pools.prefix_cache import CachedChunk


@dataclass(slots=True, eq=False)
class PageTable:
    """One sequence's pages: ``groups[g][i]`` holds chunk i of layer group g, NULL_PAGE if given back.

    ``device`` is its home, from which its pages come as long as it has some. ``kept_from[g]`` is the first
    chunk not given back, ``held_on`` the number of pages held on each device, over all groups. The first
    chunks, ``shared``, are in the prefix cache: other tables may hold them too, and nobody writes there.
    """

    model: ModelIndex
    device: KvDevice
    layout: KvLayout
    groups: list[list[PageId]]
    kept_from: list[int]
    held_on: list[int]
    shared: list[CachedChunk] = field(default_factory=list)
    _snapshot: tuple[tuple[PageId, ...], ...] | None = field(default=None, repr=False)

    @property
    def pages(self) -> int:
        """Number of pages held."""
        return sum(self.held_on)

    @property
    def elsewhere(self) -> list[KvDevice]:
        """The devices other than its home where it holds pages, in order."""
        return [KvDevice(d) for d, held in enumerate(self.held_on) if held and d != self.device]

    @property
    def chunks(self) -> int:
        return len(self.groups[0])

    @property
    def tokens(self) -> int:
        """Number of positions that have a place, counted from 0."""
        return self.chunks * self.layout.tokens_per_page

    def held(self) -> Iterable[PageId]:
        for group, kept in zip(self.groups, self.kept_from, strict=True):
            yield from group[kept:]

    def written(self, tokens: int, since: int = 0) -> list[list[PageId]]:
        """By layer group: the pages held of the first ``tokens`` positions, from chunk ``since`` on."""
        chunks = self.layout.chunks(tokens)
        return [
            group[max(kept, since) : chunks] for group, kept in zip(self.groups, self.kept_from, strict=True)
        ]

    def extend(self, pages: Sequence[PageId]) -> None:
        """Whole chunks more; a chunk's pages follow one another."""
        for index, group in enumerate(self.groups):
            group.extend(pages[index :: len(self.groups)])
        self.changed()

    def extend_from(self, kept_from: Sequence[int], chunks: int, pages: Iterable[PageId]) -> None:
        """Up to so many chunks, in layer group g none before chunk ``kept_from[g]``."""
        rest = iter(pages)
        for chunk in range(self.chunks, chunks):
            for group, first in zip(self.groups, kept_from, strict=True):
                group.append(NULL_PAGE if chunk < first else next(rest))
        self.kept_from[:] = kept_from
        self.changed()

    def snapshot(self) -> tuple[tuple[PageId, ...], ...]:
        """The table as plain data for a grant; made once per change."""
        if self._snapshot is None:
            self._snapshot = tuple(tuple(group) for group in self.groups)
        return self._snapshot

    def changed(self) -> None:
        self._snapshot = None
