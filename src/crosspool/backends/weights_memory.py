"""Memory that a model's weights are copied into, and the way to give back what they were copied from."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from crosspool.core.errors import OutOfMemoryError

HUGE_PAGE = 1 << 21
SEGMENT = 1 << 28
_LINE = 64


class HugeArena:
    """Anonymous memory in huge pages, where the system has them; it is never given back in parts.

    Address space is taken a segment at a time, physical memory as it is first written: on the NUMA node of
    the thread that writes. The tensors keep their segment alive.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on cache lines of its own, all zero. Raises OutOfMemoryError."""
        size = math.prod(shape) * dtype.itemsize
        lines = -(-size // _LINE) * _LINE
        if lines > self._free.numel():
            self._free = _segment(max(lines, SEGMENT))
        taken, self._free = self._free[:size], self._free[lines:]
        return taken.view(dtype).view(*shape)


def _segment(size: int) -> Tensor:
    """uint8 [at least ``size``] that begins with a huge page."""
    length = -(-size // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise OutOfMemoryError("address space for weights", needed=length, free=0) from None
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + length - HUGE_PAGE]


def release(file: Path) -> None:
    """Give back this process's pages of a file, where it is mapped and nobody has written to it.

    Whoever reads on has them again, from the system's file cache, where they stay until it needs the room: an
    engine that is started again finds them there.
    """
    libc, name = ctypes.CDLL(None, use_errno=True), str(file.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, *_, path = line.split(maxsplit=5)
        if path != name:
            continue
        begin, end = (int(bound, 16) for bound in bounds.split("-"))
        if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}", name)
