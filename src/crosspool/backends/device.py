"""A device that runs what is put into its streams, and tells by events how far it is: what the executor of
workers/cuda is written against.

backends/cuda.py is a GPU. Tests have a device that interprets kernels at once, and one that runs nothing but
checks the order of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crosspool.kernels.triton.tiles import Chip


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether everything before it has run. Raises DeviceError if the device has failed meanwhile."""
        ...

    def wait(self) -> None:
        """Block until it has. Raises DeviceError."""
        ...

    def since(self, earlier: Any) -> int:
        """Nanoseconds from an earlier point of a stream of the same device; both are done."""
        ...


Stream = Any
"""An order of work of one device. Streams of a device run beside each other."""

Graph = Any
"""Launches recorded once, to be put into a stream together."""


class Device(Protocol):
    """One device by its configured name. What has a stream as an argument is put into it and returns at once.

    Memory is taken before ``seal`` and stays until ``close``.
    """

    @property
    def name(self) -> str: ...

    @property
    def physical(self) -> str:
        """Devices that are one chip have the same: they read each other's memory as their own."""
        ...

    @property
    def chip(self) -> Chip:
        """What kernels have to know of it."""
        ...

    @property
    def processors(self) -> int:
        """How many programs it runs side by side at least."""
        ...

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device, all zero, on 256 bytes. Raises OutOfMemoryError."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory, all zero, that the device reads and writes at the same address, and all other devices
        likewise. Raises OutOfMemoryError."""
        ...

    def stream(self, *, urgent: bool) -> Stream:
        """A new stream. While both have work, an urgent one goes before one that is not."""
        ...

    def run(self, stream: Stream, launches: Callable[[], object]) -> None:
        """Kernels that ``launches`` launches go into the stream."""
        ...

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        """``target``, of this device or pinned, becomes what ``source`` is then: pinned, or of any device."""
        ...

    def record(self, stream: Stream) -> Event:
        """The point that the stream has reached when everything put into it until now has run."""
        ...

    def follow(self, stream: Stream, leader: Stream) -> None:
        """What is put into the stream from now on runs after all that another stream, of whichever device,
        has until now."""
        ...

    def reaches(self, other: Any) -> bool:
        """Whether kernels here may store into the memory of a device on another chip, and exchange words
        there; if so, they may from now on."""
        ...

    def capture(self, stream: Stream, launches: Callable[[], object]) -> Graph:
        """Record what ``launches`` launches, after running it once so that all code is compiled.

        It may put work into other streams, of other devices too, that have followed this one inside; this
        one follows them before it ends. No event is recorded inside, and what is copied between chips is
        copied from or to pinned memory.
        """
        ...

    @property
    def loops(self) -> bool:
        """Whether it can repeat launches without the host: then ``loop`` may be called."""
        ...

    def loop(
        self,
        stream: Stream,
        first: Callable[[], object],
        launches: Callable[[], object],
        again: Tensor,
    ) -> Graph:
        """Record a graph that runs ``first``, and then ``launches`` for as long as the word ``again`` (int64
        [1]) of the device is not 0; both write it. Each is run once before, so that all code is compiled."""
        ...

    def replay(self, stream: Stream, graph: Graph) -> None:
        """Put a graph into the stream."""
        ...

    def check(self) -> None:
        """Raises DeviceError if the device has failed."""
        ...

    def finish(self) -> None:
        """Wait until everything put into the device's streams has run."""
        ...

    def seal(self) -> None:
        """From now on nothing is allocated."""
        ...

    def check_sealed(self) -> None:
        """Raises InvariantError if something was allocated since ``seal``."""
        ...
