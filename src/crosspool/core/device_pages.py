"""Which KV device a page is on: page ids count through the devices, one after another."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from crosspool.core.ids import KvDevice, PageId


@dataclass(frozen=True, slots=True)
class DevicePages:
    """``starts[d]`` is the first page of KV device d; the last entry is the number of all pages."""

    starts: tuple[int, ...]

    @staticmethod
    def of(counts: Iterable[int]) -> DevicePages:
        """From the number of pages of each device, in their order."""
        return DevicePages((0, *accumulate(counts)))

    @property
    def devices(self) -> tuple[KvDevice, ...]:
        return tuple(KvDevice(index) for index in range(len(self.starts) - 1))

    @property
    def total(self) -> int:
        return self.starts[-1]

    def pages_of(self, device: KvDevice) -> range:
        return range(self.starts[device], self.starts[device + 1])

    def device_of(self, page: PageId) -> KvDevice:
        """Of a page that there is."""
        return KvDevice(bisect_right(self.starts, page) - 1)
