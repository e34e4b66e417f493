"""What launchers must know of the chip they launch on."""

from __future__ import annotations

import torch
from triton.runtime import driver

AMD, AMPERE, HOPPER, BLACKWELL = 0, 8, 9, 10


def generation() -> int:
    """The major compute capability of NVIDIA's chips, AMD for all of AMD's. Without a GPU, where kernels are
    interpreted, it is HOPPER."""
    if torch.version.hip is not None:
        return AMD
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else HOPPER


def shared_bytes(device: int) -> int:
    """Shared memory that one program can have on a GPU."""
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def stages(nvidia: int, amd: int = 2) -> int:
    """Tiles that a loop loads ahead: AMD's chips have 64 KiB of shared memory, NVIDIA's 164 or more."""
    return amd if generation() == AMD else nvidia


def warps(nvidia: int) -> int:
    """Warps of a program with large tiles. AMD's have 64 threads, and 512 registers for each where there are
    no more than 4."""
    return min(nvidia, 4) if generation() == AMD else nvidia


def all_registers() -> dict[str, int]:
    """Options of a kernel that shall have as many registers as there are, however many of its programs would
    fit a multiprocessor with fewer. On AMD's it has them."""
    return {} if generation() == AMD else {"maxnreg": 255}
