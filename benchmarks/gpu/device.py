"""The GPU that is measured, its limits, and how long things take on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from crosspool.backends.factory import make_cuda_devices
from crosspool.core.errors import CrossPoolError
from gpu.results import Figure

ROUNDS = 20
COPY_BYTES, MATMUL_SIZE = 1 << 30, 8192


class NoGpuError(Exception):
    """There is no GPU that can be measured."""


@contextmanager
def open_gpu(*, interpreted: bool) -> Iterator[Gpu]:
    """Raises NoGpuError, and says why."""
    with TemporaryDirectory() as folder:
        yield Gpu(_device(interpreted), Path(folder), interpreted=interpreted)


def _device(interpreted: bool) -> Any:
    if interpreted:
        from gpu.interpreted import CpuDevice

        return CpuDevice("cuda:0")
    try:
        return make_cuda_devices(("cuda:0",))[0]
    except CrossPoolError as error:
        raise NoGpuError(f"there is no GPU to measure: {error}") from error


class Gpu:
    """``device`` is what backends/device.py says. ``at`` is where its tensors are, ``folder`` is for
    configs of models. With ``interpreted``, sizes are tiny and times mean nothing."""

    def __init__(self, device: Any, folder: Path, *, interpreted: bool) -> None:
        self.device = device
        self.folder = folder
        self.interpreted = interpreted
        self.at = torch.device("cpu" if interpreted else device.physical)
        self.stream = device.stream(urgent=True)
        self.rounds = 1 if interpreted else ROUNDS
        self._generator = torch.Generator(self.at).manual_seed(0)

    @property
    def lost(self) -> bool:
        """Whether it answers nothing any more."""
        try:
            self.device.finish()
        except CrossPoolError:
            return True
        return False

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, deviation: float = 1.0) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=self.at)
        made.normal_(0, deviation, generator=self._generator)
        self.device.finish()
        return made

    def eager(self, launches: Callable[[], object]) -> Callable[[], None]:
        """Launches one by one, into the stream."""
        return partial(self.device.run, self.stream, launches)

    def recorded(self, launches: Callable[[], object]) -> Callable[[], None]:
        """The same launches as one graph."""
        return partial(self.device.replay, self.stream, self.device.capture(self.stream, launches))

    def seconds(self, work: Callable[[], object], rounds: int | None = None) -> float:
        """The median time of ``work``, which puts something into the stream, by the device's own clock."""
        if not self.interpreted:
            work()
            self.device.finish()
        spans = []
        for _ in range(rounds or self.rounds):
            begin = self.device.record(self.stream)
            work()
            spans.append((begin, self.device.record(self.stream)))
        self.device.finish()
        return statistics.median(end.since(begin) for begin, end in spans) / 1e9

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy of much memory, read and written."""
        size = 1 << 16 if self.interpreted else COPY_BYTES
        source, target = (torch.ones(size, dtype=torch.uint8, device=self.at) for _ in range(2))
        self.device.finish()
        return 2 * size / self.seconds(self.eager(lambda: target.copy_(source)))

    @cached_property
    def matmul_peak(self) -> float:
        """Operations per second of a large bfloat16 product."""
        size = 32 if self.interpreted else MATMUL_SIZE
        left, right = (self.random(size, size) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * size**3 / self.seconds(self.eager(lambda: torch.mm(left, right, out=out)))

    def bandwidth_figures(self, name: str, read: float, seconds: float, target: float | None) -> list[Figure]:
        """Time, bytes per second, and their share of what a copy has in this process."""
        rate = read / seconds
        return [
            Figure(f"{name}: time", 1e6 * seconds, "us"),
            Figure(f"{name}: bandwidth", rate / 1e9, "GB/s"),
            Figure(f"{name}: share of a copy's", rate / self.copy_bandwidth, "", target),
        ]
