"""A seeded draw from unnormalised probabilities: a function of seed and index alone.

The same numbers as kernels/reference/sampling.py: SplitMix64 (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014) as a function of its counter.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel

BLOCK = 1024
LANES = 32

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR, SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S11, S27, S30, S31 = (np.uint64(bits) for bits in (11, 27, 30, 31))


@inline
def _mix(z):
    """The finaliser of SplitMix64: a bijection on 64 bits."""
    z = (z ^ (z >> S30)) * FIRST_FACTOR
    z = (z ^ (z >> S27)) * SECOND_FACTOR
    return z ^ (z >> S31)


@inline
def uniform(seed, index):
    """The draw number ``index`` of ``seed`` (int64 both), uniform in [0, 1), with 53 random bits."""
    counter = np.uint64(index + 1) * GOLDEN
    return np.float64(_mix(_mix(np.uint64(seed)) + counter) >> S11) * 2.0**-53


def sums_floats(count: int) -> int:
    """Float64 values that ``sums`` of ``count`` weights take."""
    return (count + BLOCK - 1) // BLOCK + LANES


@kernel
def add_up(weights, count, sums):
    """The sum of ``count`` weights (float64, none negative). ``sums[b]`` becomes the sum up to the end of
    block b.

    A block has LANES partial sums, added in order, and so are the blocks.
    """
    blocks = (count + BLOCK - 1) // BLOCK
    lanes = sums[blocks : blocks + LANES]
    total = 0.0
    for block in range(blocks):
        inputs = weights[block * BLOCK : min(block * BLOCK + BLOCK, count)]
        lanes[:] = 0.0
        for strip in range(len(inputs) // LANES):
            part = inputs[strip * LANES : strip * LANES + LANES]
            for lane in range(LANES):
                lanes[lane] += part[lane]
        rest = inputs[len(inputs) // LANES * LANES :]
        for lane in range(len(rest)):
            lanes[lane] += rest[lane]
        inside = 0.0
        for lane in range(LANES):
            inside += lanes[lane]
        total += inside
        sums[block] = total
    return total


@kernel
def draw(weights, count, u, sums):
    """Invert the cumulative distribution of ``weights`` (float64 [>= count], at least one above zero) at
    ``u`` in [0, 1); a weight of zero is never drawn. ``sums`` is scratch, see ``sums_floats``."""
    total = add_up(weights, count, sums)
    target = min(u * total, np.nextafter(total, 0.0))
    block = 0
    while sums[block] <= target:
        block += 1
    before = sums[block - 1] if block > 0 else 0.0
    token = -1
    for i in range(block * BLOCK, min(block * BLOCK + BLOCK, count)):
        if weights[i] > 0:
            # Should this order of adding not reach what the lanes did, it is the last one of the block.
            token = i
            before += weights[i]
            if before > target:
                break
    return token
