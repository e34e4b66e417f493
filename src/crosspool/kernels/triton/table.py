"""How a kernel reads the words of words.py."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.words import LAYER_WORDS, LAYERS

_LAYERS: tl.constexpr = tl.constexpr(LAYERS)
_LAYER_WORDS: tl.constexpr = tl.constexpr(LAYER_WORDS)


@triton.jit
def layer_word(lane, layer, WORD: tl.constexpr):
    """A word of a layer of the lane's model. ``lane`` points to the lane's words (int64)."""
    layers = tl.load(lane + _LAYERS).to(tl.pointer_type(tl.int64))
    return tl.load(layers + layer * _LAYER_WORDS + WORD)


@triton.jit
def layer_weights(lane, layer, WORD: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer to the weights whose address is a word of a layer of the lane's model."""
    return aligned(layer_word(lane, layer, WORD), DTYPE)


@triton.jit
def lane_weights(lane, WORD: tl.constexpr, DTYPE: tl.constexpr):
    """A pointer to the weights whose address is a word of the lane."""
    return aligned(tl.load(lane + WORD), DTYPE)


@triton.jit
def aligned(address, DTYPE: tl.constexpr):
    """A pointer to ``DTYPE`` from an address, which is a multiple of 256. Saying so is what makes loads of
    128 bits: a compiler knows nothing of numbers that come from memory."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
