"""Reading bfloat16 kept as 16 bits, which numpy has no type for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def from_bf16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 of each bfloat16, exactly."""
    return (values.astype(np.uint32) << 16).view(np.float32)
