"""Kernels that a gate must not let through, in a module that the compiling process can import."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def doubled(address, out, HINTED: tl.constexpr):
    """``out`` [2048] is twice what is at an address that only the caller knows to be aligned."""
    source = address.to(tl.pointer_type(tl.float32))
    if HINTED:
        source = tl.multiple_of(source, 16)
    at = tl.arange(0, 2048)
    tl.store(out + at, 2 * tl.load(source + at))


@triton.jit
def gram(rows, out, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """``out`` [SIZE, SIZE], the products of all pairs of ``rows`` [SIZE, DEPTH]."""
    at = tl.arange(0, SIZE)
    block = tl.load(rows + at[:, None] * DEPTH + tl.arange(0, DEPTH))
    tl.store(out + at[:, None] * SIZE + at, tl.dot(block, block.T))
