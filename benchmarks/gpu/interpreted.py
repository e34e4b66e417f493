"""A device for trying this code where there is no GPU: that of the tests, whose kernels are interpreted."""

from __future__ import annotations

from helpers_devices import InterpretedDevice

TOTAL_BYTES = 1 << 30


class CpuDevice(InterpretedDevice):
    """With as much memory as an engine asks about."""

    total_bytes = free_bytes = TOTAL_BYTES


def make_devices(names: tuple[str, ...]) -> tuple[CpuDevice, ...]:
    """As backends.factory.make_cuda_devices."""
    return tuple(CpuDevice(name) for name in names)
