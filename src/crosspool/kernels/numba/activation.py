"""The gate of a gated FFN, by the public names of its activation (kernels/reference/ffn.py)."""

from __future__ import annotations

import math

import numpy as np

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.elements import round_to
from crosspool.kernels.numba.exp import exp

SILU, GELU, GELU_TANH, RELU = range(4)
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_pytorch_tanh": GELU_TANH, "relu": RELU}

ONE, TWO, HALF, ZERO = np.float32(1), np.float32(2), np.float32(0.5), np.float32(0)
SQRT_HALF = np.float32(math.sqrt(0.5))
SQRT_TWO_OVER_PI = np.float32(math.sqrt(2 / math.pi))
CUBIC = np.float32(0.044715)


@kernel
def gate_by(activation, gate, up, count, dtype):
    """``gate`` becomes activation(gate) * up, both float32 [>= count]; inputs, activation and product are
    rounded to ``dtype``."""
    round_to(gate, count, dtype)
    round_to(up, count, dtype)
    if activation == SILU:
        for i in range(count):
            gate[i] = gate[i] / (ONE + exp(-gate[i]))
    elif activation == GELU:
        for i in range(count):
            gate[i] = gate[i] * HALF * (ONE + np.float32(math.erf(gate[i] * SQRT_HALF)))
    elif activation == GELU_TANH:
        for i in range(count):
            inner = SQRT_TWO_OVER_PI * (gate[i] + CUBIC * gate[i] * gate[i] * gate[i])
            gate[i] = HALF * gate[i] * (ONE + (ONE - TWO / (ONE + exp(TWO * inner))))
    else:
        for i in range(count):
            gate[i] = gate[i] if gate[i] > ZERO or np.isnan(gate[i]) else ZERO
    round_to(gate, count, dtype)
    for i in range(count):
        gate[i] *= up[i]
    round_to(gate, count, dtype)
