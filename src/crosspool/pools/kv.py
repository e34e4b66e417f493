"""The KV virtualizer: maps each sequence's positions to pages of the KV devices, for all models at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import NULL_PAGE, KvDevice, ModelIndex, PageId
from crosspool.core.kv_layout import KvLayout
from crosspool.pools.pages import PageAllocator


@dataclass(slots=True, eq=False)
class PageTable:
    """One sequence's pages: ``groups[g][i]`` holds chunk i of layer group g, NULL_PAGE if given back.

    ``device`` is its home, from which its pages come as long as it has some. ``kept_from[g]`` is the first
    chunk not given back, ``held_on`` the number of pages held on each device, over all groups.
    """

    model: ModelIndex
    device: KvDevice
    layout: KvLayout
    groups: list[list[PageId]]
    kept_from: list[int]
    held_on: list[int]
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

    def snapshot(self) -> tuple[tuple[PageId, ...], ...]:
        """The table as plain data for a grant; made once per change."""
        if self._snapshot is None:
            self._snapshot = tuple(tuple(group) for group in self.groups)
        return self._snapshot

    def changed(self) -> None:
        self._snapshot = None


class KvPool:
    """All pages of all KV devices, and the page table of every sequence that holds some.

    A model with an entry in ``homes`` keeps its pages on that device; others use all. ``step_tokens`` is the
    most by which a sequence grows at once (a prompt chunk): a window group holds up to that many tokens more
    than its window. ``releases`` counts how often a table gave something back: while it stands still, no page
    has become free and nobody has left.
    """

    def __init__(
        self,
        layouts: Mapping[ModelIndex, KvLayout],
        places: DevicePages,
        *,
        step_tokens: int,
        homes: Mapping[ModelIndex, KvDevice] | None = None,
    ) -> None:
        self._layouts = dict(layouts)
        self._homes = homes or {}
        self._allocator = PageAllocator(*(len(places.pages_of(device)) for device in places.devices))
        self.releases = 0
        self._held_by_model = dict.fromkeys(self._layouts, 0)
        self._step_tokens = step_tokens
        self._most_tokens = {model: self._find_most_tokens(model) for model in self._layouts}

    @property
    def places(self) -> DevicePages:
        """Which page is on which device."""
        return self._allocator.places

    @property
    def devices(self) -> tuple[KvDevice, ...]:
        return self.places.devices

    @property
    def total(self) -> int:
        return self._allocator.total

    @property
    def free(self) -> int:
        return self._allocator.free

    def free_on(self, device: KvDevice) -> int:
        return self._allocator.free_on(device)

    def held_by(self, model: ModelIndex) -> int:
        """Pages that this model's sequences hold now."""
        return self._held_by_model[model]

    def layout(self, model: ModelIndex) -> KvLayout:
        return self._layouts[model]

    def reach(self, model: ModelIndex) -> tuple[KvDevice, ...]:
        """The devices on which this model's sequences may hold pages."""
        home = self._homes.get(model)
        return self.devices if home is None else (home,)

    def pages_for(self, model: ModelIndex, tokens: int) -> int:
        """The most pages that one sequence of this model holds while it grows to ``tokens`` tokens."""
        layout = self._layouts[model]
        chunks = layout.chunks(tokens)
        pages = 0
        for group in layout.groups:
            if group.window is None:
                pages += chunks
            else:
                pages += min(chunks, layout.chunks(group.window + self._step_tokens) + 1)
        return pages

    def most_tokens(self, model: ModelIndex) -> int:
        """The longest sequence of this model that all devices within its reach can hold together."""
        return self._most_tokens[model]

    def open(self, model: ModelIndex, device: KvDevice) -> PageTable:
        """An empty page table with this home. It holds nothing until it grows."""
        layout = self._layouts[model]
        groups: list[list[PageId]] = [[] for _ in layout.groups]
        return PageTable(model, device, layout, groups, [0] * len(groups), [0] * len(self.devices))

    def missing(self, table: PageTable, tokens: int) -> int:
        """Pages that the table lacks to hold ``tokens`` tokens."""
        return max(0, table.layout.chunks(tokens) - table.chunks) * len(table.groups)

    def grow(self, table: PageTable, tokens: int) -> bool:
        """Give the table a place for every position below ``tokens``: all of the pages it lacks, or none.

        They come from its home; what that lacks, from other devices within the model's reach. A chunk's pages
        are taken together.
        """
        missing = self.missing(table, tokens)
        if missing == 0:
            return True
        pages = self._allocator.allocate(missing, table.device, spread=table.model not in self._homes)
        if pages is None:
            return False
        for index, group in enumerate(table.groups):
            group.extend(pages[index :: len(table.groups)])
        self._count(table, pages, 1)
        table.changed()
        return True

    def trim(self, table: PageTable, position: int) -> None:
        """Give back the pages of window groups that no token at ``position`` or later can see."""
        for index, group in enumerate(table.groups):
            if table.layout.groups[index].window is None:
                continue
            first = min(table.layout.first_kept_chunk(index, position), len(group))
            kept = table.kept_from[index]
            if first > kept:
                self.releases += 1
                self._give_back(table, group[kept:first])
                group[kept:first] = [NULL_PAGE] * (first - kept)
                table.kept_from[index] = first
                table.changed()

    def release(self, table: PageTable) -> None:
        """Give back everything; the table is empty and may grow again from position 0."""
        self.releases += 1
        for index, group in enumerate(table.groups):
            self._give_back(table, group[table.kept_from[index] :])
            group.clear()
            table.kept_from[index] = 0
        table.changed()

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raise InvariantError unless free and held pages are exactly all pages, by device and by model."""
        held: list[PageId] = []
        by_model = dict.fromkeys(self._layouts, 0)
        for table in tables:
            own = Counter(map(self.places.device_of, table.held()))
            if table.held_on != [own[device] for device in self.devices]:
                raise InvariantError(
                    f"a table of model {table.model} counts {table.held_on} pages, not {own}"
                )
            held.extend(table.held())
            by_model[table.model] += table.pages
        self._allocator.check(held)
        if by_model != self._held_by_model:
            raise InvariantError(f"pages by model are {by_model}, but {self._held_by_model} was counted")

    def _give_back(self, table: PageTable, pages: list[PageId]) -> None:
        self._allocator.release(pages)
        self._count(table, pages, -1)

    def _count(self, table: PageTable, pages: list[PageId], sign: int) -> None:
        """The table has taken these pages (1) or given them back (-1)."""
        self._held_by_model[table.model] += sign * len(pages)
        if len(self.devices) == 1:
            table.held_on[0] += sign * len(pages)
            return
        for page in pages:
            table.held_on[self.places.device_of(page)] += sign

    def _find_most_tokens(self, model: ModelIndex) -> int:
        """Largest multiple of tokens_per_page whose pages fit (binary search: it is monotonic)."""
        layout = self._layouts[model]
        pages = sum(len(self.places.pages_of(device)) for device in self.reach(model))
        unbounded = all(group.window is not None for group in layout.groups)
        low, high = 0, pages * (1 << 20 if unbounded else 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.pages_for(model, middle * layout.tokens_per_page) <= pages:
                low = middle
            else:
                high = middle - 1
        return low * layout.tokens_per_page
