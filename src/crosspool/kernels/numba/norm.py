"""Root-mean-square norm (arXiv 1910.07467) of float32 vectors in place."""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.elements import round_to, widen

LANES = 16


@kernel
def rms_norm(values, count, weight, eps, dtype, room):
    """Norm ``values`` (float32 [>= count]) by the weights of type ``dtype`` at address ``weight``.

    The normed values are rounded to ``dtype`` before the weight multiplies them, and the products after it,
    as in the reference. ``room`` is scratch, float32 [>= count + LANES]. The sum of squares has LANES partial
    sums, added in order.
    """
    sums = room[count : count + LANES]
    sums[:] = np.float32(0)
    whole = count - count % LANES
    for begin in range(0, whole, LANES):
        for lane in range(LANES):
            sums[lane] += values[begin + lane] * values[begin + lane]
    for i in range(whole, count):
        sums[i - whole] += values[i] * values[i]
    total = np.float32(0)
    for lane in range(LANES):
        total += sums[lane]
    gain = np.float32(1) / np.sqrt(total / np.float32(count) + np.float32(eps))
    widen(weight, dtype, count, room)
    for i in range(count):
        values[i] *= gain
    round_to(values, count, dtype)
    for i in range(count):
        values[i] *= room[i]
    round_to(values, count, dtype)
