"""Memory that is carved anew for every geometry, always in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from crosspool.core.errors import InvariantError

ALIGNMENT = 256
"""Bytes. Of all that begins in device memory."""

META = torch.device("meta")
"""Where tensors have a shape and a type and no memory."""

T = TypeVar("T", bound=tuple[Any, ...])


class Room:
    """Each ``take`` gives what comes next. Launches that follow each other may use one room for this and
    that; ``zeros`` is memory that is 0 between any two launches, and all of them share its begin."""

    def __init__(self, memory: Tensor | None, zeros: Tensor | None = None) -> None:
        """``memory`` uint8 and ``zeros`` int32, or None to learn how much there has to be."""
        self._memory = memory
        self._zeros = zeros
        self.used = 0
        self.zeros_used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises InvariantError if there is too little left."""
        size = prod(shape) * dtype.itemsize
        begin, self.used = self.used, self.used + -(-size // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            return torch.empty(*shape, dtype=dtype, device=META)
        if self.used > self._memory.numel():
            raise InvariantError(f"{self.used:,} bytes carved from a room of {self._memory.numel():,}")
        return self._memory[begin : begin + size].view(dtype).view(*shape)

    def like(self, pattern: T) -> T:
        """Tensors as in a named tuple of tensors, and of such tuples. A field ``arrivals`` is zeros."""
        names: tuple[str, ...] = getattr(pattern, "_fields", ())
        return type(pattern)(*(self._like(name, getattr(pattern, name)) for name in names))

    def overlaid(self, patterns: Sequence[T]) -> list[T]:
        """Tensors like each pattern, all in the same memory: only one of them is in use at a time."""
        begin, end, taken = self.used, self.used, []
        for pattern in patterns:
            self.used = begin
            taken.append(self.like(pattern))
            end = max(end, self.used)
        self.used = end
        return taken

    def _like(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._zero(value) if name == "arrivals" else self.take(value.shape, value.dtype)
        return self.like(value) if isinstance(value, tuple) else value

    def _zero(self, pattern: Tensor) -> Tensor:
        count = pattern.numel()
        self.zeros_used = max(self.zeros_used, count)
        if self._zeros is None:
            return pattern
        if count > self._zeros.numel():
            raise InvariantError(f"{count:,} zeros wanted of {self._zeros.numel():,}")
        return self._zeros[:count].view(pattern.shape)
