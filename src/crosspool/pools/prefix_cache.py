"""The prefix cache: computed chunks that any later sequence with the same beginning may use.

A chunk (one page per layer group) is known by a key made from all that its content depends on, the model and
every token up to its end, and from the tenant. Whoever holds a chunk holds all chunks before it. A chunk that
nobody holds stays for as long as its pages are not needed.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.core.ids import KvDevice, ModelIndex, PageId

KEY_BYTES = 16


def root_key(secret: bytes, model: ModelIndex, tenant: bytes) -> bytes:
    """The key before a sequence's first chunk.

    With a ``secret`` of 16 to 64 random bytes no key can be computed outside this process, so that nobody can
    look for two prompts of the same key, or for those of another tenant.
    """
    return blake2b(model.to_bytes(4) + tenant, key=secret, digest_size=KEY_BYTES).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the chunk that holds ``tokens`` and follows the one known by ``key``."""
    return blake2b(key + array("I", tokens).tobytes(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, slots=True, eq=False)
class CachedChunk:
    """A computed chunk: one page per layer group."""

    key: bytes
    model: ModelIndex
    pages: tuple[PageId, ...]


class Found(NamedTuple):
    """Chunks of a sequence that are in the prefix cache, how many of them some table holds, and the device
    where the last of them begins."""

    chunks: int = 0
    held: int = 0
    home: KvDevice | None = None


class PrefixCache:
    """Chunks by key, and the order in which those that nobody holds are given up.

    The least recently held goes first, and of one sequence's chunks the last: no chunk is worth anything
    without those before it. That follows from ``rest`` being told of a sequence's chunks from its last to its
    first, because a held chunk's predecessors are held too. ``resting`` counts the pages of chunks that
    nobody holds, ``resting_on[d]`` those on device d.
    """

    def __init__(self, places: DevicePages) -> None:
        self._places = places
        self._chunks: dict[bytes, CachedChunk] = {}
        self._resting: OrderedDict[bytes, CachedChunk] = OrderedDict()
        self.resting_on = [0] * len(places.devices)
        self.resting = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: bytes) -> CachedChunk | None:
        return self._chunks.get(key)

    def add(self, chunk: CachedChunk) -> None:
        """A chunk that has just been computed, by a sequence that holds it."""
        self._chunks[chunk.key] = chunk

    def is_resting(self, chunk: CachedChunk) -> bool:
        return chunk.key in self._resting

    def rest(self, chunk: CachedChunk) -> None:
        """Nobody holds the chunk any more."""
        self._resting[chunk.key] = chunk
        self._count(chunk, 1)

    def wake(self, chunk: CachedChunk) -> bool:
        """Somebody holds the chunk. Returns whether nobody did before."""
        if self._resting.pop(chunk.key, None) is None:
            return False
        self._count(chunk, -1)
        return True

    def evict(self, device: KvDevice | None = None) -> CachedChunk:
        """Forget the chunk that is worth least of those that nobody holds (with a page on ``device``, if one
        is given). There must be one."""
        if device is None or len(self.resting_on) == 1:
            _, chunk = self._resting.popitem(last=False)
        else:
            chunk = next(chunk for chunk in self._resting.values() if self._is_on(chunk, device))
            del self._resting[chunk.key]
        del self._chunks[chunk.key]
        self._count(chunk, -1)
        return chunk

    def _is_on(self, chunk: CachedChunk, device: KvDevice) -> bool:
        return any(self._places.device_of(page) == device for page in chunk.pages)

    def _count(self, chunk: CachedChunk, sign: int) -> None:
        """The chunk rests (1) or does not any more (-1)."""
        self.resting += sign * len(chunk.pages)
        if len(self.resting_on) == 1:
            self.resting_on[0] += sign * len(chunk.pages)
            return
        for page in chunk.pages:
            self.resting_on[self._places.device_of(page)] += sign

    def chunks(self) -> Iterable[CachedChunk]:
        return self._chunks.values()

    def check(self, held: Container[PageId]) -> None:
        """Raise InvariantError unless exactly the chunks with no page in ``held`` may be evicted."""
        for chunk in self._chunks.values():
            in_use = [page in held for page in chunk.pages]
            if any(in_use) != all(in_use) or in_use[0] == self.is_resting(chunk):
                raise InvariantError(
                    f"the cached chunk of pages {chunk.pages} rests though it is held, or the reverse"
                )
        pages = Counter(self._places.device_of(page) for c in self._resting.values() for page in c.pages)
        on_devices = [pages[device] for device in self._places.devices]
        if self.resting_on != on_devices or self.resting != sum(on_devices):
            raise InvariantError(f"{pages} cached pages were counted as {self.resting_on}")
