"""The KV virtualizer: maps each sequence's positions to pages of the KV devices, for all models at once.

Every page is free, held by one or more page tables, or cached: nobody holds it, but what was computed into it
is kept for whoever begins with the same tokens, until a table needs the page.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import NULL_PAGE, KvDevice, ModelIndex, PageId
from crosspool.core.kv_layout import KvLayout
from crosspool.pools.page_needs import growing_pages, most_tokens, settled_pages
from crosspool.pools.page_table import PageTable
from crosspool.pools.pages import PageAllocator
from crosspool.pools.prefix_cache import CachedChunk, Found, PrefixCache, root_key
from crosspool.pools.quotas import Quota, Quotas


class KvPool:
    """All pages of all KV devices, and the page table of every sequence that holds some.

    A model with an entry in ``homes`` keeps its pages on that device; others use all. ``step_tokens`` is the
    most by which a sequence grows at once (a prompt chunk): a window group holds up to that many tokens more
    than its window. ``quotas`` are those of models that have one. ``prefix_secret`` is the random secret of
    the prefix cache's keys, None for no cache. ``places`` says which page is on which of the ``devices``.
    ``releases`` counts how often a table gave something back: while it stands still, no page has become free
    and nobody has left. ``evicted`` counts cached pages given up, by model.
    """

    def __init__(
        self,
        layouts: Mapping[ModelIndex, KvLayout],
        places: DevicePages,
        *,
        step_tokens: int,
        homes: Mapping[ModelIndex, KvDevice] | None = None,
        quotas: Mapping[ModelIndex, Quota] | None = None,
        prefix_secret: bytes | None = None,
    ) -> None:
        self._layouts = dict(layouts)
        self._homes = homes or {}
        self._allocator = PageAllocator(*(len(places.pages_of(device)) for device in places.devices))
        self.places = self._allocator.places
        self.devices = self.places.devices
        self._cache = PrefixCache(self.places)
        self._prefix_secret = prefix_secret
        self.releases = 0
        self.evicted: Counter[ModelIndex] = Counter()
        self._quotas = self._make_quotas(quotas or {})
        self._step_tokens = step_tokens
        self._most_tokens = {
            model: most_tokens(layout, self._quotas[model].most(model), step_tokens)
            for model, layout in self._layouts.items()
        }

    @property
    def models(self) -> Iterable[ModelIndex]:
        return self._layouts.keys()

    @property
    def total(self) -> int:
        return self._allocator.total

    @property
    def free(self) -> int:
        return self._allocator.free

    @property
    def cached(self) -> int:
        """Pages that nobody holds, kept by the prefix cache until they are needed."""
        return self._cache.resting

    def available_on(self, device: KvDevice) -> int:
        """Pages that a table could have now: free or cached."""
        return self._allocator.free_on(device) + self._cache.resting_on[device]

    def held_by(self, model: ModelIndex) -> int:
        """Pages that this model's sequences hold now, those shared by several counted once."""
        return self._quotas[model].held_by(model)

    @property
    def held(self) -> int:
        """Pages that any sequence holds."""
        return self.total - self.free - self.cached

    def quotas(self, model: ModelIndex) -> Quotas:
        """The account of all models that share this one's devices."""
        return self._quotas[model]

    def available_within(self, reach: Iterable[KvDevice]) -> int:
        """Pages of these devices that are free or cached."""
        return sum(map(self.available_on, reach))

    def available_to(self, model: ModelIndex) -> int:
        """Pages that are free or cached and that this model may take."""
        home = self._homes.get(model)
        everywhere = self._allocator.free + self._cache.resting
        available = everywhere if home is None else self.available_on(home)
        return self._quotas[model].available(model, available)

    def layout(self, model: ModelIndex) -> KvLayout:
        return self._layouts[model]

    def reach(self, model: ModelIndex) -> tuple[KvDevice, ...]:
        """The devices on which this model's sequences may hold pages."""
        home = self._homes.get(model)
        return self.devices if home is None else (home,)

    def pages_for(self, model: ModelIndex, tokens: int) -> int:
        """The most pages that one sequence of this model holds while it grows to ``tokens`` tokens."""
        return growing_pages(self._layouts[model], tokens, self._step_tokens)

    def settled_pages(self, model: ModelIndex, tokens: int) -> int:
        """Pages that one sequence of this model holds when it grows beyond ``tokens`` token by token."""
        return settled_pages(self._layouts[model], tokens)

    def most_tokens(self, model: ModelIndex) -> int:
        """The longest sequence of this model that all devices within its reach can hold together, and its
        quota allows."""
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
        are taken together. Nothing is taken that is kept for other models, or would pass the model's cap.
        """
        missing = self.missing(table, tokens)
        if missing == 0:
            return True
        pages = self._take_pages(table, missing)
        if pages is None:
            return False
        table.extend(pages)
        return True

    def restore(self, table: PageTable, tokens: int, kept_from: Sequence[int]) -> bool:
        """Give a table that holds nothing but shared chunks the pages of ``tokens`` computed tokens, in layer
        group g those from chunk ``kept_from[g]`` on: all that it lacks, or none. They come from where those
        of ``grow`` come from."""
        chunks = table.layout.chunks(tokens)
        pages = self._take_pages(table, sum(chunks - max(first, table.chunks) for first in kept_from))
        if pages is None:
            return False
        table.extend_from(kept_from, chunks, pages)
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
        for chunk in reversed(table.shared):
            self._let_go(table, chunk)
        for index, group in enumerate(table.groups):
            self._give_back(table, group[max(table.kept_from[index], len(table.shared)) :])
            group.clear()
            table.kept_from[index] = 0
        table.shared.clear()
        table.changed()

    # -- the prefix cache -----------------------------------------------------------------------------

    def caches(self, model: ModelIndex) -> bool:
        """Whether this model's chunks are cached. Those of a model with window layers are not: what has
        fallen out of a window is gone, though a sequence that begins anew would need it."""
        return self._prefix_secret is not None and all(
            group.window is None for group in self._layouts[model].groups
        )

    def root_key(self, model: ModelIndex, tenant: bytes) -> bytes:
        """The key before the first chunk of a sequence of a model that is cached (see prefix_cache.py)."""
        assert self._prefix_secret is not None
        return root_key(self._prefix_secret, model, tenant)

    def find(self, keys: Iterable[bytes]) -> Found:
        """What there is of the chunks known by ``keys``, from the first on without a gap."""
        found, held, last = 0, 0, None
        for key in keys:
            chunk = self._cache.get(key)
            if chunk is None:
                break
            found += 1
            held += not self._cache.is_resting(chunk)
            last = chunk
        home = None if last is None else self.places.device_of(last.pages[0])
        return Found(found, held, home)

    def share(self, table: PageTable, keys: Iterable[bytes]) -> None:
        """Hold the cached chunks that follow those which the table shares already, ``keys`` being theirs, up
        to the first that is not there, or that the model's quota forbids. The table's own pages for these
        positions are given back."""
        for key in keys:
            chunk = self._cache.get(key)
            if chunk is None or not self._may_take(table, chunk):
                return
            self._take(table, chunk)

    def chunks_of_others(self, table: PageTable) -> int:
        """How many of a table's first chunks other tables hold too. Whoever holds a chunk holds all before
        it, so that ever fewer hold the later ones."""
        return bisect_left(table.shared, True, key=lambda chunk: self._holders(chunk) == 1)

    def shared_by_others(self, table: PageTable) -> float:
        """The part of a table's pages that is on the others' account: of chunks that n tables hold, all but
        an n-th. All are taken to be held by as many as the first."""
        if not table.shared or self._holders(table.shared[0]) == 1:
            return 0.0
        chunks = self.chunks_of_others(table)
        return chunks * len(table.groups) * (1 - 1 / self._holders(table.shared[0]))

    def publish(self, table: PageTable, keys: Iterable[bytes]) -> None:
        """Let others use the chunks that follow those which the table shares already, now that every position
        in them is computed. Where another table has published the same, its pages take their place."""
        for key in keys:
            chunk = self._cache.get(key)
            if chunk is not None:
                self._take(table, chunk)
                continue
            pages = tuple(group[len(table.shared)] for group in table.groups)
            chunk = CachedChunk(key, table.model, pages)
            self._cache.add(chunk)
            self._allocator.retain(pages)
            table.shared.append(chunk)

    def _holders(self, chunk: CachedChunk) -> int:
        """Tables that hold a published chunk; the cache refers to its pages too."""
        return self._allocator.references(chunk.pages[0]) - 1

    def _may_take(self, table: PageTable, chunk: CachedChunk) -> bool:
        """Whether the model may hold a cached chunk (which may be in place of pages that the table holds)."""
        return not self._cache.is_resting(chunk) or len(chunk.pages) <= self.available_to(table.model)

    def _take(self, table: PageTable, chunk: CachedChunk) -> None:
        """The table's next shared chunk."""
        index = len(table.shared)
        self._allocator.retain(chunk.pages)
        if self._cache.wake(chunk):
            self._quotas[table.model].count(table.model, len(chunk.pages))
        if index < table.chunks:
            self.releases += 1
            self._give_back(table, [group[index] for group in table.groups])
        self._count(table, chunk.pages, 1)
        for group, page in zip(table.groups, chunk.pages, strict=True):
            group[index : index + 1] = (page,)
        table.shared.append(chunk)
        table.changed()

    def _let_go(self, table: PageTable, chunk: CachedChunk) -> None:
        self._allocator.release(chunk.pages)
        self._count(table, chunk.pages, -1)
        if self._holders(chunk) == 0:
            self._cache.rest(chunk)
            self._quotas[table.model].count(table.model, -len(chunk.pages))

    def _take_pages(self, table: PageTable, count: int) -> list[PageId] | None:
        """So many pages for a table, on its account, or None."""
        if count > self.available_to(table.model):
            return None
        pages = self._allocate(count, table.device, spread=table.model not in self._homes)
        self._quotas[table.model].count(table.model, count)
        self._count(table, pages, 1)
        return pages

    def _allocate(self, count: int, home: KvDevice, *, spread: bool) -> list[PageId]:
        """Free pages, cached chunks being given up for what is lacking. There are enough of both.

        Cached pages at home go before pages of other devices: what is spread is slower for all its tokens.
        """
        allocator, cache = self._allocator, self._cache
        while count > allocator.free_on(home) and cache.resting_on[home]:
            self._evict(cache.evict(home))
        while spread and count > allocator.free:
            self._evict(cache.evict())
        pages = allocator.allocate(count, home, spread=spread)
        assert pages is not None
        return pages

    def _evict(self, chunk: CachedChunk) -> None:
        self._allocator.release(chunk.pages)
        self.evicted[chunk.model] += len(chunk.pages)

    # -- accounts -------------------------------------------------------------------------------------

    def check(self, tables: Iterable[PageTable]) -> None:
        """Raise InvariantError unless free, held and cached pages are exactly all pages, by device and by
        model, and within the models' quotas."""
        used: list[PageId] = []
        held: dict[PageId, ModelIndex] = {}
        for table in tables:
            pages = list(table.held())
            own = Counter(map(self.places.device_of, pages))
            if table.held_on != [own[device] for device in self.devices]:
                raise InvariantError(
                    f"a table of model {table.model} counts {table.held_on} pages, not {own}"
                )
            used.extend(pages)
            held.update(dict.fromkeys(pages, table.model))
        self._cache.check(held)
        for chunk in self._cache.chunks():
            used.extend(chunk.pages)
        self._allocator.check(used)
        by_model = Counter(held.values())
        for reach, quotas in {self.reach(model): quotas for model, quotas in self._quotas.items()}.items():
            quotas.check({model: by_model[model] for model in quotas}, self.available_within(reach))
        if len(held) + self.cached + self.free != self.total:
            raise InvariantError(
                f"{self.total} pages, but {len(held)} held, {self.cached} cached, {self.free} free"
            )

    def _give_back(self, table: PageTable, pages: list[PageId]) -> None:
        """Pages that no other table holds."""
        self._allocator.release(pages)
        self._quotas[table.model].count(table.model, -len(pages))
        self._count(table, pages, -1)

    def _count(self, table: PageTable, pages: Collection[PageId], sign: int) -> None:
        """The table has taken these pages (1) or given them back (-1)."""
        if len(self.devices) == 1:
            table.held_on[0] += sign * len(pages)
            return
        for page in pages:
            table.held_on[self.places.device_of(page)] += sign

    def _make_quotas(self, given: Mapping[ModelIndex, Quota]) -> dict[ModelIndex, Quotas]:
        """One account for all models that have the same devices within their reach."""
        sharing: dict[tuple[KvDevice, ...], list[ModelIndex]] = {}
        for model in self._layouts:
            sharing.setdefault(self.reach(model), []).append(model)
        quotas: dict[ModelIndex, Quotas] = {}
        for reach, models in sharing.items():
            pages = sum(len(self.places.pages_of(device)) for device in reach)
            account = Quotas({model: given.get(model, Quota()) for model in models}, pages)
            quotas.update(dict.fromkeys(models, account))
        return quotas
