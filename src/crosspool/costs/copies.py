"""What it costs to copy KV pages to host memory and back."""

from __future__ import annotations

from crosspool.core.copies import Direction
from crosspool.core.ids import Nanoseconds
from crosspool.costs.calibration import Ratio
from crosspool.costs.layer import HardwareProfile


class CopyCosts:
    """Time in each direction: the profile's bandwidth, corrected by that of the copies there have been."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._ratios = {direction: Ratio() for direction in Direction}

    def time(self, direction: Direction, size: int) -> Nanoseconds:
        """Predicted time of ``size`` bytes."""
        return self._ratios[direction].correct(self._profile.copy_time(size))

    def learn(self, direction: Direction, size: int, measured: Nanoseconds) -> None:
        self._ratios[direction].learn(self._profile.copy_time(size), measured)
