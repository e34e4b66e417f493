"""Where the weights that compiled kernels read are: in the mapped checkpoint, or copied into memory of their
own as they are or in int8."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, Future
from typing import Protocol

import torch
from torch import Tensor

from crosspool.backends.base import WeightsArena
from crosspool.kernels.numba.matrix import Int8Weight, Weight, quantise

WHOLE = slice(None)
_QUANTISED_AT_ONCE = 1 << 16
"""Elements."""
_MEMORY_PAGE = 4096


class Placement(Protocol):
    """Makes of a loaded tensor what a model keeps."""

    def tensor(self, tensor: Tensor) -> Tensor:
        """Of the same shape, dtype and values."""
        ...

    def matrix(self, weight: Tensor, columns: slice = WHOLE) -> Weight:
        """Some columns of a matrix that may be quantised, for products only. Scales are those of whole rows,
        so that what a weight becomes does not depend on how many devices share the matrix."""
        ...


class InPlace:
    """Weights stay where they were loaded."""

    def tensor(self, tensor: Tensor) -> Tensor:
        read_in([tensor])
        return tensor

    def matrix(self, weight: Tensor, columns: slice = WHOLE) -> Weight:
        return self.tensor(weight)[:, columns]


class InArena:
    """Weights are copied; with ``int8``, matrices are quantised on the way.

    ``threads`` do the work: their memory is what they write first. It is done when ``finish`` returns, and
    until then nothing of the tensors given may change.
    """

    def __init__(self, arena: WeightsArena, threads: Executor, *, int8: bool) -> None:
        self._arena = arena
        self._threads = threads
        self._int8 = int8
        self._running: list[Future[object]] = []

    def tensor(self, tensor: Tensor) -> Tensor:
        copy = self._arena.take(tensor.shape, tensor.dtype)
        self._running.append(self._threads.submit(copy.copy_, tensor))
        return copy

    def matrix(self, weight: Tensor, columns: slice = WHOLE) -> Weight:
        if not self._int8:
            return self.tensor(weight[:, columns])
        rows, width = weight.shape
        values = self._arena.take((rows, len(range(width)[columns])), torch.int8)
        kept = Int8Weight(values, self._arena.take((rows,), torch.float32))
        self._running.append(self._threads.submit(_quantise, weight, columns, kept))
        return kept

    def finish(self) -> None:
        """Wait, and raise what went wrong."""
        running, self._running = self._running, []
        for work in running:
            work.result()


def _quantise(weight: Tensor, columns: slice, kept: Int8Weight) -> None:
    """A block of rows at a time, so that what lies between is small and in the caches."""
    rows, width = weight.shape
    step = max(1, _QUANTISED_AT_ONCE // width)
    for first in range(0, rows, step):
        block = quantise(weight[first : first + step])
        kept.values[first : first + step] = block.values[:, columns]
        kept.scales[first : first + step] = block.scales


def read_in(tensors: Iterable[Tensor]) -> None:
    """Touch every page: views of a mapped file are read from the disk now, not during the first request."""
    for tensor in tensors:
        tensor.view(torch.uint8).flatten()[::_MEMORY_PAGE].sum()
