"""The spill store: host memory for the pages of preempted sequences, so that they need not be computed again.

Only the account is here: which host pages are in use, and what they hold. An executor has the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from crosspool.core.errors import InvariantError
from crosspool.core.ids import HostPage


@dataclass(frozen=True, slots=True, eq=False)
class SpilledPages:
    """Where the computed tokens of one sequence are: positions 0 .. ``tokens - 1``.

    ``groups[g]`` holds the chunks of layer group g from ``kept_from[g]`` on, in order; those before had been
    given back, because they fell out of the window.
    """

    tokens: int
    kept_from: tuple[int, ...]
    groups: tuple[tuple[HostPage, ...], ...]

    @property
    def pages(self) -> Iterable[HostPage]:
        return chain.from_iterable(self.groups)

    def since(self, chunk: int) -> list[tuple[HostPage, ...]]:
        """By layer group: the host pages of this chunk and those after it."""
        return [
            group[max(0, chunk - first) :] for group, first in zip(self.groups, self.kept_from, strict=True)
        ]


class SpillStore:
    """Hands out ``total`` host pages. Those given back last are given out first: what was never written may
    not be the process's memory yet."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = [HostPage(page) for page in reversed(range(total))]

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def take(self, tokens: int, kept_from: Sequence[int], counts: Sequence[int]) -> SpilledPages | None:
        """Room for ``counts[g]`` pages of layer group g, or None (and nothing taken) if it is too little."""
        needed = sum(counts)
        if needed > len(self._free):
            return None
        pages = iter(self._free[len(self._free) - needed :])
        del self._free[len(self._free) - needed :]
        return SpilledPages(tokens, tuple(kept_from), tuple(tuple(islice(pages, count)) for count in counts))

    def give_back(self, spilled: SpilledPages) -> None:
        self._free.extend(spilled.pages)

    def check(self, spilled: Iterable[SpilledPages]) -> None:
        """Raise InvariantError unless these are all that is in the store, each host page once."""
        used = [page for pages in spilled for page in pages.pages]
        if sorted(used + self._free) != list(range(self.total)):
            raise InvariantError(
                f"{self.total} host pages, but sequences have {len(used)} and {len(self._free)} are free, or "
                "one is in use twice"
            )
