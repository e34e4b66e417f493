"""How rows of tensors cross from one team of a lane to another while a pass runs.

Teams on one chip have no need to: each reads the other's memory. Decodes between GPUs that reach each other's
memory store rows there and raise a flag (kernels/triton/crossing.py), so each GPU runs its part of a pass by
itself. Between other GPUs rows go through pinned memory, which a graph over several GPUs may do. Prompts have
many rows and no graph: the copy engine takes them.

That kernels wait for each other never stops them all, although streams may share queues in which a kernel
that waits holds up what is behind it. One thread puts passes into streams, all that belongs to one before
anything of the next, on every GPU; and of a pass, each GPU has one graph at most that waits. So on every GPU
what is before a launch of the earliest pass that has not ended is of that pass, in its order, or has ended.
By induction every pass ends, or finds out that another GPU does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from torch import Tensor

from crosspool.backends.device import Device, Stream
from crosspool.core.batch import Phase
from crosspool.kernels.triton.crossing import RAISED, SENT, TAKEN, Carried, Flag
from crosspool.kernels.triton.words import QUERIES, ROWS

SIZES = slice(ROWS, QUERIES + 1)


class Way(Enum):
    SHARED = "shared memory"
    STORES = "stores into each other's memory"
    STAGED = "copies through host memory"
    COPIES = "copies"


def way_between(one: Device, other: Device, phase: Phase) -> Way:
    if one.physical == other.physical:
        return Way.SHARED
    if phase is Phase.PREFILL:
        return Way.COPIES
    return Way.STORES if one.reaches(other) and other.reaches(one) else Way.STAGED


@dataclass(frozen=True, slots=True)
class Track:
    """A lane on one device: its stream there, and the memory it works in. What crosses between it and the
    lane's home goes this ``way``; ``flags`` int64 [teams, FLAG_WORDS] are for all teams of the machine."""

    device: Device
    stream: Stream
    memory: Tensor
    zeros: Tensor
    flags: Tensor
    way: Way


@dataclass(frozen=True, slots=True)
class Port:
    """A team from which, or to which, something crosses, with the lane's ``words`` there."""

    team: int
    track: Track
    words: Tensor


class Flags(Protocol):
    """What launches the kernels of kernels/triton/crossing.py."""

    def send(self, lane: Tensor, carried: Carried, sizes: Tensor | None, flag: Flag) -> None: ...

    def receive(self, lane: Tensor, flag: Flag) -> None: ...


class Crossing(Protocol):
    """One way from one team to another, for the same rows each time."""

    def send(self) -> None:
        """What the sender's stream has until now is what crosses."""
        ...

    def receive(self) -> None:
        """What comes into the receiver's stream finds it there."""
        ...


def make_crossing(
    way: Way, source: Port, target: Port, carried: Carried, flags: Flags, *, tells: bool
) -> Crossing:
    """``carried`` are tensors [T, ...] of the target and of the source; with ``tells``, the target's lane
    hears how large the pass is."""
    if way is Way.STORES:
        return Stored(source, target, carried, flags, tells)
    words = [(target.words[SIZES], source.words[SIZES])] if tells else []
    if way is Way.STAGED:
        return Staged(source.track, target.track, _staged(source.track.device, [*words, *carried]))
    return Copied(source.track, target.track, words if way is Way.SHARED else [*words, *carried])


@dataclass(frozen=True, slots=True)
class Copied:
    """By the copy engine, in the receiver's stream."""

    source: Track
    target: Track
    carried: Carried

    def send(self) -> None:
        pass

    def receive(self) -> None:
        device, stream = self.target.device, self.target.stream
        device.follow(stream, self.source.stream)
        for target, source in self.carried:
            device.copy(stream, target, source)


@dataclass(frozen=True, slots=True)
class Staged:
    """Copied out by one GPU and in by the other: (target, between, source) of each."""

    source: Track
    target: Track
    carried: Sequence[tuple[Tensor, Tensor, Tensor]]

    def send(self) -> None:
        for _, between, source in self.carried:
            self.source.device.copy(self.source.stream, between, source)

    def receive(self) -> None:
        device, stream = self.target.device, self.target.stream
        device.follow(stream, self.source.stream)
        for target, between, _ in self.carried:
            device.copy(stream, target, between)


def _staged(device: Device, carried: Carried) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tensors without memory, which only say how much is needed of a device, need none on the host."""
    return [
        (target, source if source.is_meta else device.pinned(source.shape, source.dtype), source)
        for target, source in carried
    ]


@dataclass(frozen=True, slots=True)
class Stored:
    """By a kernel of the sender, and one of the receiver that waits. All crossings of a lane one way have one
    flag: both sides put them into their streams in the same order."""

    source: Port
    target: Port
    carried: Carried
    flags: Flags
    tells: bool

    def send(self) -> None:
        source, sizes = self.source, self.target.words if self.tells else None
        launch = partial(self.flags.send, source.words, self.carried, sizes, self._flag)
        source.track.device.run(source.track.stream, launch)

    def receive(self) -> None:
        target = self.target
        target.track.device.run(target.track.stream, partial(self.flags.receive, target.words, self._flag))

    @property
    def _flag(self) -> Flag:
        own, there = self.source.track, self.target.track.flags[self.source.team]
        sent = own.flags[self.target.team][SENT : SENT + 1]
        return Flag(sent, there[RAISED : RAISED + 1], there[TAKEN : TAKEN + 1], own.zeros[:1])
