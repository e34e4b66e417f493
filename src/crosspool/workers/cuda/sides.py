"""What computes a pass: the attention side at home, and the FFN side of every weights device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.crossing import Carried, Flag, receive, send, settle
from crosspool.kernels.triton.pass_begin import enter, lead
from crosspool.kernels.triton.states import States
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.attention import HomeSurroundings, KvPages
from crosspool.workers.cuda.attention_elsewhere import AttentionElsewhere, SpreadAttentionPass
from crosspool.workers.cuda.attention_side import AttentionSidePass
from crosspool.workers.cuda.ffn_side import FfnSidePass
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import HiddenStates, Limits, Ring
from crosspool.workers.cuda.room import Room


class AttentionSide(Protocol):
    """See attention_side.AttentionSidePass."""

    @property
    def lane(self) -> Tensor: ...

    @property
    def hidden(self) -> HiddenStates: ...

    def ask_again(self) -> None: ...

    def begin(self) -> None: ...

    def attention(self, layer: int) -> None: ...

    def head(self) -> None: ...

    def end(self) -> None: ...


class SpreadSide(AttentionSide, Protocol):
    """See attention_elsewhere.SpreadAttentionPass."""

    @property
    def batch(self) -> Pass: ...

    @property
    def states(self) -> States: ...

    def norm(self, layer: int) -> None: ...

    def part(self, layer: int) -> None: ...

    def merge(self, layer: int) -> None: ...


class PartSide(Protocol):
    """See attention_elsewhere.AttentionElsewhere."""

    @property
    def batch(self) -> Pass: ...

    @property
    def normed(self) -> Tensor: ...

    @property
    def folded(self) -> States: ...

    def begin(self) -> None: ...

    def attention(self, layer: int) -> None: ...


class FfnSide(Protocol):
    """See ffn_side.FfnSidePass."""

    def ffn(self, layer: int, normed: Tensor, out: Tensor) -> None: ...


class Sides(Protocol):
    """Makes both for passes of a geometry; with rooms that have no memory, only to learn their size. A lane's
    words say what they run."""

    def enter(self, lane: Tensor, grant: int) -> None:
        """Launch: the lane runs the grant at this address from now on."""
        ...

    def lead(self, lane: Tensor, layers: int, frequencies: int) -> None:
        """Launch: likewise where the lane has no home, of the layers and frequencies at these addresses."""
        ...

    def send(self, lane: Tensor, carried: Carried, sizes: Tensor | None, flag: Flag) -> None:
        """Launch: store rows at another team and raise the flag. See kernels/triton/crossing.py."""
        ...

    def receive(self, lane: Tensor, flag: Flag) -> None:
        """Launch: wait for the flag."""
        ...

    def settle(self, lane: Tensor, flags: Tensor, *, failed: bool) -> None:
        """Launch: nothing is under way to this team."""
        ...

    def attention(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
    ) -> AttentionSide: ...

    def spread_attention(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
        part: int,
        parts: int,
    ) -> SpreadSide: ...

    def attention_elsewhere(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        pages: KvPages,
        chip: Chip,
        words: Tensor,
        room: Room,
    ) -> PartSide: ...

    def ffn(
        self, geometry: Geometry, queries: int, part: int, parts: int, chip: Chip, lane: Tensor, room: Room
    ) -> FfnSide: ...


class TritonSides:
    """The kernels of kernels/triton."""

    enter = staticmethod(enter)
    lead = staticmethod(lead)
    send = staticmethod(send)
    receive = staticmethod(receive)
    settle = staticmethod(settle)
    attention = staticmethod(AttentionSidePass)
    spread_attention = staticmethod(SpreadAttentionPass)
    attention_elsewhere = staticmethod(AttentionElsewhere)
    ffn = staticmethod(FfnSidePass)
