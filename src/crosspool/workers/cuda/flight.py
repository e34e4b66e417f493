"""One grant in flight on a device, and how far it is.

Its work is put into its lane's streams unit by unit: a decode's passes, or the layer tasks of a prompt chunk
(the halves of its layers in turn, and then its head).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from crosspool.core.batch import Grant, Phase
from crosspool.core.ids import Nanoseconds, RequestId
from crosspool.workers.cuda.grant import PackedGrant
from crosspool.workers.cuda.lane_pass import LanePass, Route
from crosspool.workers.cuda.model import DeviceModel
from crosspool.workers.grant_rows import tokens_of


class FlightLane(Protocol):
    """The lane that a flight runs in (lanes.py)."""

    @property
    def has_place(self) -> bool:
        """Whether it takes a unit now."""
        ...

    def bind(self, flight: Flight) -> None:
        """The flight runs here from now on."""
        ...

    def put(self, flight: Flight) -> None:
        """Put the flight's next unit into its streams."""
        ...

    def release(self, flight: Flight) -> None:
        """Nothing of the flight is in its streams, nor will be."""
        ...


@dataclass(eq=False, slots=True)
class Flight:
    """``put`` units are in the lane's stream, of which ``queued`` may not have run yet. ``over``: the device
    has said that nothing more will come of it. ``error``: why the grant fails.

    ``dropped`` are requests that the engine wants no more of, and ``gone`` those whose rows have left.
    ``others`` are the teams of the KV devices beside its home that have pages of its rows.
    ``start_by`` and ``passed`` as in core/pick.py, of the next unit. ``ends`` is when the last layer task of
    a chunk is expected to end. ``spans`` are measured times of units.
    """

    grant: Grant
    packed: PackedGrant
    model: DeviceModel
    route: Route
    start_by: int
    others: tuple[int, ...] = ()
    lane: FlightLane | None = None
    lane_pass: LanePass | None = None
    put: int = 0
    queued: int = 0
    passed: int = 0
    ends: int = 0
    recalled: bool = False
    over: bool = False
    retired: bool = False
    error: str | None = None
    dropped: set[RequestId] = field(default_factory=set)
    gone: set[RequestId] = field(default_factory=set)
    undelivered: set[RequestId] = field(default_factory=set)
    spans: list[int] = field(default_factory=list)
    made: int = 0

    @property
    def decoding(self) -> bool:
        return self.grant.phase is Phase.DECODE

    @property
    def units(self) -> int:
        """At most."""
        return self.grant.steps if self.decoding else 2 * self.model.geometry.num_layers + 1

    @property
    def rows_left(self) -> int:
        """Rows that the next pass has at most."""
        return len(self.grant.rows) - len(self.dropped | self.gone)

    @property
    def queries(self) -> int:
        """Of the next pass, at most."""
        return self.rows_left if self.decoding else tokens_of(self.grant)

    @property
    def goes_on(self) -> bool:
        """Whether more of it is to be put into the stream. A recalled grant has one pass at least."""
        if self.over or self.error is not None or self.put == self.units:
            return False
        if self.recalled and self.decoding and self.put > 0:
            return False
        return self.rows_left > 0

    @property
    def ended(self) -> bool:
        """Whether nothing of it will touch a page any more."""
        return self.over or (self.queued == 0 and not self.goes_on)

    @property
    def layer_times(self) -> tuple[Nanoseconds, Nanoseconds]:
        """Mean spans of attention and FFN halves. A decode's passes are measured as a whole, and each half is
        taken to have half of it; passes that were put into the stream for nothing do not count."""
        layers = self.model.geometry.num_layers
        if self.decoding:
            spans = self.spans[: self.made]
            each = sum(spans) // (2 * layers * len(spans)) if spans else 0
            return Nanoseconds(each), Nanoseconds(each)
        halves = [self.spans[half : 2 * layers : 2] for half in (0, 1)]
        attention, ffn = (sum(spans) // len(spans) if spans else 0 for spans in halves)
        return Nanoseconds(attention), Nanoseconds(ffn)

    def launch(self) -> None:
        """Put the next unit into the lane's streams."""
        lane_pass, unit = self.lane_pass, self.put
        assert lane_pass is not None
        lane_pass.asked = self.others
        if self.decoding:
            lane_pass.run()
        elif unit < 2 * lane_pass.geometry.num_layers:
            layer, half = divmod(unit, 2)
            lane_pass.ffn(layer) if half else lane_pass.attention(layer)
        elif any(row.choice is not None for row in self.grant.rows):
            lane_pass.head()
        else:
            lane_pass.end()
        self.put += 1
