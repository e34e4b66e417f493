"""What crosses between the home of a pass and another KV device that has pages of it: numbers, positions and
page tables once a pass, and of each layer normed hidden states there and states of attention back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from crosspool.backends.device import Event
from crosspool.kernels.triton.words import QUERIES, ROWS
from crosspool.workers.cuda.lane import Track
from crosspool.workers.cuda.sides import PartSide, SpreadSide

Launch = Callable[[Track, object, Callable[[], object]], None]
"""Put launches into a stream, as the graph that a key names if there is one."""


@dataclass(frozen=True, slots=True)
class Other:
    """A pass on the KV device that is the ``part``-th of all."""

    team: int
    part: int
    track: Track
    side: PartSide

    def key(self, layer: int) -> object:
        return ("part", layer, self.team)

    def launches(self, layer: int) -> Callable[[], object]:
        return partial(self._launches, layer)

    def attend(self, layer: int, home: SpreadSide, normed: Event, launch: Launch) -> Event:
        """Its part of a layer's attention, once the home has ``normed`` what goes in. Returns when what comes
        out is in the home's room for it."""
        device, stream = self.track.device, self.track.stream
        device.wait(stream, normed)
        if layer == 0:
            self._tell(home)
        device.copy(stream, self.side.normed, home.hidden.normed)
        launch(self.track, self.key(layer), self.launches(layer))
        for target, source in zip(home.states.part(self.part), self.side.folded, strict=True):
            device.copy(stream, target, source)
        return device.record(stream)

    def _tell(self, home: SpreadSide) -> None:
        device, stream = self.track.device, self.track.stream
        sizes = slice(ROWS, QUERIES + 1)
        (words, *own), (home_words, *homes) = self.side.batch, home.batch
        device.copy(stream, words[sizes], home_words[sizes])
        for target, source in zip(own, homes, strict=True):
            device.copy(stream, target, source)

    def _launches(self, layer: int) -> None:
        if layer == 0:
            self.side.begin()
        self.side.attention(layer)
