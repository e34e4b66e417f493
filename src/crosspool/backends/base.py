"""The interface of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class WeightsArena(Protocol):
    """Memory of one device for weights that stay."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor, all zero. Physical memory is the device's own if a thread of the device is the first to
        write it. Raises OutOfMemoryError."""
        ...


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

    def new_host_arena(self, num_pages: int, page_bytes: int) -> Tensor:
        """Host memory that this device's pages are copied to and from: uint8 [num_pages, page_bytes].

        Such as the device copies fastest, pinned for instance. Raises OutOfMemoryError.
        """
        ...

    def new_weights_arena(self) -> WeightsArena:
        """Grows as tensors are taken from it, and is freed with the last of them."""
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
