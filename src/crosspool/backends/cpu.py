"""Logical CPU devices: a share of the cores each, and the host's memory together."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.backends.host_memory import free_bytes, total_bytes
from crosspool.backends.weights_memory import HugeArena
from crosspool.core.errors import ConfigError, OutOfMemoryError


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """``cores`` are the operating system's numbers of the cores on which this device's threads run, and
    ``threads`` how many of them a computation uses at once."""

    name: str
    cores: tuple[int, ...]
    threads: int

    @property
    def total_bytes(self) -> int:
        return total_bytes()

    @property
    def free_bytes(self) -> int:
        return free_bytes()

    def new_arena(self, num_pages: int, page_bytes: int) -> Tensor:
        """An anonymous private mapping, so that the kernel gives (zeroed) memory at the first write."""
        return self._map(f"{num_pages:,} KV pages on {self.name}", num_pages, page_bytes)

    def new_host_arena(self, num_pages: int, page_bytes: int) -> Tensor:
        """A mapping likewise: the device's memory is the host's."""
        return self._map(f"a spill store of {num_pages:,} pages", num_pages, page_bytes)

    def new_weights_arena(self) -> HugeArena:
        return HugeArena()

    def _map(self, what: str, num_pages: int, page_bytes: int) -> Tensor:
        size = num_pages * page_bytes
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError):
            raise OutOfMemoryError(what, needed=size, free=self.free_bytes) from None
        return torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_bytes)

    def bind_thread(self) -> None:
        os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(self.threads)

    def bind_member(self, index: int) -> None:
        os.sched_setaffinity(0, {self.cores[index % len(self.cores)]})


def make_cpu_backends(
    devices: Mapping[str, int], threads: int | None, *, leave_a_core: bool = False
) -> tuple[CpuBackend, ...]:
    """``devices`` maps names to logical numbers. In the order of these, each device has a share of the cores.

    With more devices than cores, each has one core and shares it. With ``leave_a_core``, and unless
    ``threads`` says otherwise, a computation leaves one core of a larger share to the engine's thread and the
    API process: they deliver the tokens, and OpenMP's threads wait for a part on a busy core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if threads is not None and threads > len(cores):
        raise ConfigError(f"threads is {threads}, but this process may run on {len(cores)} cores only")
    share = threads or max(1, len(cores) // len(devices))
    place = {number: index for index, number in enumerate(sorted(devices.values()))}
    return tuple(
        CpuBackend(
            name,
            tuple(sorted({cores[(place[number] * share + i) % len(cores)] for i in range(share)})),
            threads or max(1, share - leave_a_core),
        )
        for name, number in devices.items()
    )
