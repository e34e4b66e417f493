"""Lanes and layers for kernels, from tensors by their words (kernels/triton/words.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosspool.kernels.triton.words import LANE_WORDS, LAYER_WORDS, LAYERS
from helpers_triton import DEVICE

Words = Mapping[int, Tensor | int]
"""Numbers, and tensors whose addresses are meant."""


class Lane:
    """A lane in memory that runs one model: ``words`` [LANE_WORDS], which lead to ``layers``. It keeps the
    tensors alive whose addresses are in them."""

    def __init__(self, layers: Sequence[Words], own: Words) -> None:
        self._kept = [*layers, own]
        self._layers = torch.stack([_filled(LAYER_WORDS, layer) for layer in layers]).to(DEVICE)
        self.words = _filled(LANE_WORDS, {**own, LAYERS: self._layers}).to(DEVICE)

    def set(self, word: int, value: int) -> None:
        self.words[word] = value


def _filled(length: int, values: Words) -> Tensor:
    words = torch.zeros(length, dtype=torch.int64)
    for word, value in values.items():
        words[word] = value.data_ptr() if isinstance(value, Tensor) else value
    return words
