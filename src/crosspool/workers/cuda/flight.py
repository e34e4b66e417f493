"""One grant in flight on a device, and how far it is.

Its work is put into its lane's streams unit by unit: a decode's passes, or the layer tasks of a prompt chunk
(the halves of its layers in turn, and then its head).

Where the device loops, a decode is launched once and makes pass after pass. To put one more is then to let it
make one more, by a number in pinned memory. What it has not made when it ends, it has not been given in time:
then it is launched again.
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

    def takes(self, flight: Flight) -> bool:
        """Whether it takes the flight's next unit now."""
        ...

    def bind(self, flight: Flight) -> None:
        """The flight runs here from now on."""
        ...

    def put(self, flight: Flight) -> None:
        """Put the flight's next unit into its streams."""
        ...

    def row_left(self, flight: Flight) -> None:
        """One of its rows is gone or dropped."""
        ...

    def release(self, flight: Flight) -> None:
        """Nothing of the flight is in its streams, nor will be."""
        ...


@dataclass(eq=False, slots=True)
class Flight:
    """``put`` units are in the lane's stream, or may be made by the loop there. ``queued`` launches may not
    have run yet. ``over``: the device has said that nothing more will come of it. ``error``: why the grant
    fails. A decode has ``made`` passes in which some row was told a token.

    ``dropped`` are requests that the engine wants no more of, and ``gone`` those whose rows have left.
    ``start_by`` and ``passed`` as in core/pick.py, of the next unit. ``ends`` is when the last layer task of
    a chunk is expected to end. ``spans`` are measured times of launches.
    """

    grant: Grant
    packed: PackedGrant
    model: DeviceModel
    route: Route
    start_by: int
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
    def looping(self) -> bool:
        """Whether a launch makes as many passes as there may be."""
        return self.lane_pass is not None and self.lane_pass.loops

    @property
    def ahead(self) -> int:
        """Units in the streams, or in the loop, that are not known to have run."""
        return max(0, self.put - self.made) if self.looping else self.queued

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
        if self.over or self.error is not None or self.rows_left == 0:
            return False
        if self.recalled and self.decoding and (self.queued > 0 or self.made > 0):
            return False
        return self.put < self.units

    @property
    def ended(self) -> bool:
        """Whether nothing of it will touch a page any more. Of a loop the time is known when it has ended."""
        known = self.over and not self.looping
        return known or (self.queued == 0 and not self.goes_on)

    @property
    def layer_times(self) -> tuple[Nanoseconds, Nanoseconds]:
        """Mean spans of attention and FFN halves. A decode's passes are measured as a whole, or all that a
        loop has made together, and each half is taken to have half of it; passes that were put into the
        stream for nothing do not count."""
        layers = self.model.geometry.num_layers
        if self.decoding:
            spans = self.spans if self.looping else self.spans[: self.made]
            passes = self.made if self.looping else len(spans)
            each = sum(spans) // (2 * layers * passes) if passes else 0
            return Nanoseconds(each), Nanoseconds(each)
        halves = [self.spans[half : 2 * layers : 2] for half in (0, 1)]
        attention, ffn = (sum(spans) // len(spans) if spans else 0 for spans in halves)
        return Nanoseconds(attention), Nanoseconds(ffn)

    def let(self, passes: int) -> None:
        """So many more may be made by its loop."""
        self.put = min(max(self.put, self.made) + passes, self.units)
        self.packed.hold(self.units - self.put)

    def settle(self) -> None:
        """If its loop has ended, what that has not made is still to be put."""
        if self.looping and self.queued == 0:
            self.put = self.made

    def hold_back(self) -> None:
        """Its loop is to end with the pass that it now makes."""
        if self.looping:
            self.put = min(self.put, self.made + 1)
            self.packed.hold(self.units - self.put)

    def launch(self) -> None:
        """Put the next unit into the lane's streams, or the loop that makes it."""
        lane_pass, unit = self.lane_pass, self.put
        assert lane_pass is not None
        if self.decoding:
            lane_pass.run()
        elif unit < 2 * lane_pass.geometry.num_layers:
            layer, half = divmod(unit, 2)
            lane_pass.ffn(layer) if half else lane_pass.attention(layer)
        elif any(row.choice is not None for row in self.grant.rows):
            lane_pass.head()
        else:
            lane_pass.end()
        if not self.looping:
            self.put += 1
