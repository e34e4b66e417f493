"""Who takes loaded models and makes the executor that runs them: on CPUs (cpu.py), on GPUs (cuda.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from crosspool.core.ids import ModelIndex
from crosspool.core.kv_layout import KvLayout
from crosspool.core.protocols import Executor
from crosspool.core.spec import ModelSpec
from crosspool.models.weights import AttentionSideWeights, FfnWeights

Specs = Mapping[ModelIndex, ModelSpec]

Compiling = Callable[[int, int], None]
"""Told how many of how many pieces of code are there."""


class Workers(Protocol):
    """Takes models piece by piece, and then makes the executor that runs them."""

    def put_attention_side(
        self, model: ModelIndex, spec: ModelSpec, layout: KvLayout, weights: AttentionSideWeights
    ) -> None: ...

    def put_ffn(self, model: ModelIndex, layer: int, weights: FfnWeights) -> None:
        """A layer's FFN, on the weights devices that take part in it. The attention side is there already."""
        ...

    def copies(self, spec: ModelSpec) -> bool:
        """Whether what has been put of such a model is no longer read where it was loaded."""
        ...

    def remove(self, model: ModelIndex) -> None:
        """Forget whatever was put of a model."""
        ...

    def start(self, compiling: Compiling) -> Executor:
        """Everything has been put."""
        ...
