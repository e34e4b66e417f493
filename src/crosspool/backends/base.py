"""The interface of a device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """One device of either pool, by its configured name."""

    @property
    def name(self) -> str: ...

    @property
    def total_bytes(self) -> int:
        """Memory of the device that this process may use at most. Devices of one kind may share it."""
        ...

    @property
    def free_bytes(self) -> int:
        """What of it could be allocated now without swapping."""
        ...

    def new_arena(self, num_pages: int, page_bytes: int) -> Tensor:
        """Memory for KV pages: uint8 [num_pages, page_bytes], all zero.

        Physical memory is taken as pages are first written, where the device can do that. Raises
        OutOfMemoryError.
        """
        ...

    @property
    def threads(self) -> int:
        """How many threads compute together on this device."""
        ...

    def bind_thread(self) -> None:
        """Make the calling thread one of this device's: on its cores, with its share of compute threads."""
        ...

    def bind_member(self, index: int) -> None:
        """Make the calling thread number ``index`` of this device's ``threads``, on a core of its own."""
        ...
