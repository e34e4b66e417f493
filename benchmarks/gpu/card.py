"""Section 0: versions, the card, and the limits that everything else is held against."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
import triton

from crosspool.backends.cuda_loop import BINDINGS
from gpu.device import Gpu
from gpu.results import Case, Figure


def describe() -> dict[str, object]:
    """Versions, and what the card says of itself, as plain data."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "bindings": next((d.version for d in metadata.distributions(name=BINDINGS)), None),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": getattr(card, "L2_cache_size", None),
        }
    return found


def cases(gpu: Gpu) -> list[Case]:
    def limits() -> list[Figure]:
        return [
            Figure("processors", gpu.device.processors),
            Figure("memory", gpu.device.total_bytes / 1e9, "GB"),
            Figure("copy bandwidth", gpu.copy_bandwidth / 1e9, "GB/s"),
            Figure("matmul peak, bf16", gpu.matmul_peak / 1e12, "TFLOP/s"),
        ]

    return [Case("limits", limits)]
