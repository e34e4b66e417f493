"""Memory that a model's weights are copied into, and the way to give back what they were copied from."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from crosspool.core.errors import OutOfMemoryError

HUGE_PAGE = 1 << 21
SEGMENT = 1 << 28
_LINE = 64
_PAGEOUT = 21
"""MADV_PAGEOUT of Linux's mman.h, which Python's mmap does not name."""


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


def page_out(address: int, size: int) -> None:
    """Give back physical memory of a mapped file's range, and the file cache below it.

    Contents stay: whoever reads on has them read from the file again. Pages that other processes map too stay
    in memory, and so do those of a file that this process may not write; the system then takes them when it
    needs room.
    """
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), _PAGEOUT)
