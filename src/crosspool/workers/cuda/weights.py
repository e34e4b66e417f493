"""Weights in the memory of a device: one arena, filled through pinned buffers while models load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosspool.backends.device import Device, Event
from crosspool.workers.cuda.room import Room

STAGING_BYTES = 1 << 26
"""Of each of two buffers: while one is copied to the device, the other is filled."""


class Staging:
    """Carries host tensors to a device."""

    def __init__(self, device: Device, size: int = STAGING_BYTES) -> None:
        self._device = device
        self._stream = device.stream(urgent=False)
        self._buffers = [device.pinned((size,), torch.uint8) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]
        self._next = 0

    def put(self, target: Tensor, source: Tensor) -> None:
        """``target`` becomes what ``source`` is now; both have one shape and dtype, and the target is
        contiguous. Done when ``finish`` returns."""
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"{source.dtype} {tuple(source.shape)} into {target.dtype} {tuple(target.shape)}"
            )
        flat, step = target.view(-1), len(self._buffers[0]) // target.dtype.itemsize
        rows = source if source.dim() > 0 else source.view(1)
        per_row = max(1, rows[0].numel())
        if per_row > step:
            for own, piece in zip(target, source, strict=True):
                self.put(own, piece)
            return
        at_once = step // per_row
        for first in range(0, len(rows), at_once):
            piece = rows[first : first + at_once]
            begin = first * per_row
            self._put_piece(flat[begin : begin + piece.numel()], piece)

    def _put_piece(self, target: Tensor, source: Tensor) -> None:
        number, self._next = self._next, 1 - self._next
        copied = self._copied[number]
        if copied is not None:
            copied.wait()
        buffer = self._buffers[number][: source.nbytes].view(source.dtype)
        buffer.view(source.shape).copy_(source)
        self._device.copy(self._stream, target, buffer)
        self._copied[number] = self._device.record(self._stream)

    def finish(self) -> None:
        """Wait until everything is in place."""
        for copied in self._copied:
            if copied is not None:
                copied.wait()


class WeightsArena:
    """Memory of one device for the weights of all models."""

    def __init__(self, device: Device, size: int) -> None:
        self.room = Room(device.tensor((size,), torch.uint8))
        self.staging = Staging(device)

    def put(self, source: Tensor) -> Tensor:
        """A copy on the device. Raises InvariantError if the arena is full."""
        return self.stack([source])

    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        """Copies one after another in their first dimension."""
        rows = sum(len(source) for source in sources)
        target = self.room.take((rows, *sources[0].shape[1:]), sources[0].dtype)
        first = 0
        for source in sources:
            self.staging.put(target[first : first + len(source)], source)
            first += len(source)
        return target

    def forget(self, used: int) -> None:
        """Give back everything since so many bytes were in use."""
        self.room.used = used
