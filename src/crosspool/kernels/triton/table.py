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
