"""The gate of a gated FFN, by the public names of its activation (kernels/reference/ffn.py)."""

from __future__ import annotations

import math

import triton
import triton.language as tl

SILU, GELU, GELU_TANH, RELU = range(4)
ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_pytorch_tanh": GELU_TANH, "relu": RELU}

_SILU: tl.constexpr = tl.constexpr(SILU)
_GELU: tl.constexpr = tl.constexpr(GELU)
_GELU_TANH: tl.constexpr = tl.constexpr(GELU_TANH)
_SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_SQRT_TWO_OVER_PI: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """activation(gate) * up in DTYPE, of float32; both, and the activation, are rounded to DTYPE before."""
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    if ACTIVATION == _SILU:
        gate = gate / (1 + tl.exp(-gate))
    elif ACTIVATION == _GELU:
        gate = gate * 0.5 * (1 + tl.erf(gate * _SQRT_HALF))
    elif ACTIVATION == _GELU_TANH:
        inner = _SQRT_TWO_OVER_PI * (gate + _CUBIC * gate * gate * gate)
        gate = 0.5 * gate * (1 + (1 - 2 / (1 + tl.exp(2 * inner))))
    else:
        gate = tl.where(gate < 0, 0.0, gate)
    return (gate.to(DTYPE).to(tl.float32) * up).to(DTYPE)
