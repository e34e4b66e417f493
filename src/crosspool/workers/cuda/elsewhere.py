"""Halves of layers that other devices than a pass's home compute, and what crosses to them and back.

FFNs, or parts of them: normed hidden states go there, and what has become of them comes back. Attention to
contexts that are on several KV devices: likewise, and states of attention come back; and once a pass numbers,
positions and page tables go there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.crossing import Carried
from crosspool.kernels.triton.states import States
from crosspool.workers.cuda.crossing import Crossing, Flags, Port, Way, make_crossing
from crosspool.workers.cuda.lane import HiddenStates
from crosspool.workers.cuda.room import Room
from crosspool.workers.cuda.sides import FfnSide, PartSide, SpreadSide


class Launch(NamedTuple):
    """Something that a team puts into its stream."""

    team: int
    put: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """One kind of half at one team: ``computes`` launches that of a layer. ``begins`` is its first layer,
    with which ``first`` crosses; with others ``there`` does."""

    port: Port
    computes: Callable[[int], object]
    begins: int
    first: Crossing
    there: Crossing
    back: Crossing

    def crossing(self, layer: int) -> Crossing:
        return self.first if layer == self.begins else self.there

    def launches(self, layer: int) -> Iterator[Launch]:
        team, track = self.port.team, self.port.track
        yield Launch(team, self.crossing(layer).receive)
        yield Launch(team, partial(track.device.run, track.stream, partial(self.computes, layer)))
        yield Launch(team, self.back.send)


def ffn_elsewhere(
    home: Port,
    port: Port,
    hidden: HiddenStates,
    part: int,
    begins: int,
    side: FfnSide,
    room: Room,
    flags: Flags,
) -> Elsewhere:
    """The ``part``-th of what the FFN is made of."""
    source, target = hidden.normed, hidden.outputs[part]
    ins, out = source, target
    if port.track.way is not Way.SHARED:
        ins, out = (room.take(source.shape, source.dtype) for _ in range(2))
    cross = partial(make_crossing, port.track.way, flags=flags)
    return Elsewhere(
        port,
        lambda layer: side.ffn(layer, ins, out),
        begins,
        first=cross(home, port, [(ins, source)], tells=True),
        there=cross(home, port, [(ins, source)], tells=False),
        back=cross(port, home, [(target, out)], tells=False),
    )


def attention_elsewhere(
    home: Port, port: Port, spread: SpreadSide, part: int, side: PartSide, flags: Flags
) -> Elsewhere:
    """What the ``part``-th KV device has of contexts."""

    def computes(layer: int) -> None:
        if layer == 0:
            side.begin()
        side.attention(layer)

    way = Way.COPIES if port.track.way is Way.SHARED else port.track.way
    cross = partial(make_crossing, way, flags=flags)
    normed = (side.normed, spread.hidden.normed)
    tables = _tables(side.batch, spread.batch, way)
    states = zip(_by_query(spread.states.part(part)), _by_query(side.folded), strict=True)
    return Elsewhere(
        port,
        computes,
        0,
        first=cross(home, port, [*tables, normed], tells=True),
        there=cross(home, port, [normed], tells=False),
        back=cross(port, home, list(states), tells=False),
    )


def _tables(target: Pass, source: Pass, way: Way) -> Carried:
    """Where rows and queries are. Only decodes' cross by stores: theirs are as many rows as queries, and
    nobody asks where the last row ends."""
    (_, starts, *own), (_, home_starts, *homes) = target, source
    if way is Way.STORES:
        starts, home_starts = starts[:-1], home_starts[:-1]
    return [(starts, home_starts), *zip(own, homes, strict=True)]


def _by_query(states: States) -> tuple[Tensor, ...]:
    """Of one part and one block: [T, ...] each."""
    return tuple(tensor.squeeze(0) for tensor in states)
