"""What computes a pass: the attention side at home, and the FFN side of every weights device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.kernels.triton.crossing import Carried, Flag, receive, send, settle
from crosspool.kernels.triton.pass_begin import enter, lead
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.attention import HomeSurroundings
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


class FfnSide(Protocol):
    """See ffn_side.FfnSidePass."""

    def ffn(self, layer: int, normed: Tensor, out: Tensor) -> None: ...


class Sides(Protocol):
    """Makes both for passes of a geometry; with rooms that have no memory, only to learn their size. A lane's
    words say what they run."""

    def enter(self, lane: Tensor, grant: int) -> None:
        """Launch: the lane runs the grant at this address from now on."""
        ...

    def lead(self, lane: Tensor, layers: int) -> None:
        """Launch: likewise where the lane has no home, of the layers at this address."""
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

    def ffn(
        self, geometry: Geometry, queries: int, part: int, parts: int, chip: Chip, lane: Tensor, room: Room
    ) -> FfnSide: ...


class TritonSides:
    """The kernels of kernels/triton."""

    def enter(self, lane: Tensor, grant: int) -> None:
        enter(lane, grant)

    def lead(self, lane: Tensor, layers: int) -> None:
        lead(lane, layers)

    def send(self, lane: Tensor, carried: Carried, sizes: Tensor | None, flag: Flag) -> None:
        send(lane, carried, sizes, flag)

    def receive(self, lane: Tensor, flag: Flag) -> None:
        receive(lane, flag)

    def settle(self, lane: Tensor, flags: Tensor, *, failed: bool) -> None:
        settle(lane, flags, failed=failed)

    def attention(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
    ) -> AttentionSide:
        return AttentionSidePass(geometry, limits, phase, around, ring, room)

    def ffn(
        self, geometry: Geometry, queries: int, part: int, parts: int, chip: Chip, lane: Tensor, room: Room
    ) -> FfnSide:
        return FfnSidePass(geometry, queries, part, parts, chip, lane, room)
