"""A device whose kernels are interpreted, at once, on the CPU: streams change nothing, and a graph is a list
of launches with the arguments that they had when it was recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import helpers_triton  # noqa: F401
from crosspool.kernels.triton.tiles import Chip

ALIGNMENT = 256


def aligned_bytes(size: int) -> Tensor:
    """uint8 [size], all zero, on 256 bytes."""
    memory = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
    begin = -memory.data_ptr() % ALIGNMENT
    return memory[begin : begin + size]


class Past:
    """An event of a device that is never behind."""

    def __init__(self) -> None:
        self.time = time.monotonic_ns()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def since(self, earlier: Past) -> int:
        return self.time - earlier.time


@dataclass
class LaunchList:
    """``launches`` are kernels with their arguments, and copies."""

    launches: list[Callable[[], object]] = field(default_factory=list)

    def run(self) -> None:
        for launch in self.launches:
            launch()


@dataclass
class LaunchLoop:
    """``first``, and then ``body`` while ``again`` is not 0; ``count`` is called in each round."""

    first: LaunchList
    body: LaunchList
    again: Tensor
    count: Callable[[], None]

    def run(self) -> None:
        self.first.run()
        while self.again:
            self.body.run()
            self.count()


class InterpretedDevice:
    """``captured`` and ``replayed`` count graphs, and ``rounds`` those of loops. A GPU runs launches before
    it records them, to compile them; here only if ``runs_first``, for it takes time. A loop is over when
    ``replay`` returns. ``reaching``: it reaches all others."""

    runs_first = reaching = False
    loops = True
    _recorded: LaunchList | None = None
    """What is being recorded, by whichever device: it may involve others."""

    def __init__(self, name: str = "cuda:0") -> None:
        self.name = name
        self.physical = name.partition("/")[0]
        self.chip = Chip(232_448, True)
        self.processors = 4
        self.captured = self.replayed = self.rounds = 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        return aligned_bytes(count * dtype.itemsize).view(dtype).view(*shape)

    pinned = tensor

    def stream(self, *, urgent: bool) -> object:
        return object()

    def run(self, stream: object, launches: Callable[[], object]) -> None:
        launches()

    def copy(self, stream: object, target: Tensor, source: Tensor) -> None:
        if InterpretedDevice._recorded is None:
            target.copy_(source)
        else:
            InterpretedDevice._recorded.launches.append(partial(target.copy_, source))

    def record(self, stream: object) -> Past:
        assert InterpretedDevice._recorded is None, "a graph has no events"
        return Past()

    def follow(self, stream: object, leader: object) -> None:
        pass

    def reaches(self, other: object) -> bool:
        return self.reaching

    def capture(self, stream: object, launches: Callable[[], object]) -> LaunchList:
        self.captured += 1
        if self.runs_first:
            launches()
        graph = LaunchList()

        def note(kernel: Any, *arguments: Any, **options: Any) -> None:
            graph.launches.append(lambda: kernel.run(*arguments, **options))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpretedFunction, "run", note)
            patch.setattr(InterpretedDevice, "_recorded", graph)
            launches()
        return graph

    def loop(
        self, stream: object, first: Callable[[], object], launches: Callable[[], object], again: Tensor
    ) -> LaunchLoop:
        return LaunchLoop(self.capture(stream, first), self.capture(stream, launches), again, self._count)

    def _count(self) -> None:
        self.rounds += 1

    def replay(self, stream: object, graph: LaunchList | LaunchLoop) -> None:
        self.replayed += 1
        graph.run()

    def check(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def seal(self) -> None:
        pass

    def check_sealed(self) -> None:
        pass
