"""What launchers must know of the chip."""

from __future__ import annotations

import torch


def stages(nvidia: int, amd: int = 2) -> int:
    """Tiles that a loop loads ahead: AMD's chips have 64 KiB of shared memory, NVIDIA's 164 or more."""
    return nvidia if torch.version.hip is None else amd
