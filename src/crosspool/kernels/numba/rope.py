"""Rotary position embedding (arXiv 2104.09864) of float32 vectors in place."""

from __future__ import annotations

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.elements import round_to


@kernel
def rotate(values, half, cos, sin, interleaved, dtype):
    """Rotate the first ``2 * half`` of ``values`` and round them to ``dtype``.

    ``cos`` and ``sin`` are float32 [>= half]. ``interleaved``: pairs are the neighbours (2i, 2i + 1),
    otherwise the halves (i, i + half).
    """
    if interleaved:
        for i in range(half):
            first, second = values[2 * i], values[2 * i + 1]
            values[2 * i] = first * cos[i] - second * sin[i]
            values[2 * i + 1] = second * cos[i] + first * sin[i]
    else:
        for i in range(half):
            first, second = values[i], values[half + i]
            values[i] = first * cos[i] - second * sin[i]
            values[half + i] = second * cos[i] + first * sin[i]
    round_to(values, 2 * half, dtype)
