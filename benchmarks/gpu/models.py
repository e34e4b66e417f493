"""Models at real geometries whose weights are random numbers, made where they stay.

They are loaded as any checkpoint is, but for two things: the checkpoint has shapes and no numbers, and the
arena fills what it is given without numbers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

import crosspool.build.cuda as build_cuda
import crosspool.build.runtime as build_runtime
from crosspool.build.runtime import build_engine
from crosspool.core.config import EngineConfig
from crosspool.core.ids import KvDevice
from crosspool.core.kv_layout import KvLayout, choose_page_bytes, make_layout
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Topology
from crosspool.engine.engine import Engine
from crosspool.kernels.float8 import Float8Weight
from crosspool.kernels.triton.words import LANE_WORDS, MODEL_WORDS, QUERIES, ROWS
from crosspool.models.checkpoint import scales_of
from crosspool.models.geometries import find_geometry
from crosspool.models.loader import load_attention_side, load_ffn
from crosspool.models.registry import read_spec
from crosspool.models.weight_names import TensorSlot
from crosspool.workers.cuda.model import DeviceModel, FfnPlace
from crosspool.workers.cuda.room import META, Room
from crosspool.workers.cuda.weights import WeightsArena
from gpu.device import Gpu

T = TypeVar("T")

ROWS_AT_ONCE = 1 << 14
"""That are made in 16 bits on the way to 8."""


def write_config(folder: Path, geometry: str, **changes: Any) -> Path:
    """A model folder with the public config of a geometry, but for ``changes``, and without weights."""
    source = find_geometry(geometry)
    assert source is not None, geometry
    values = json.loads((source / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


class ShapesOnly:
    """In place of models.checkpoint.Checkpoint: every tensor is there and has no memory."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)

    def tensor(self, slot: TensorSlot, dtype: torch.dtype) -> Tensor:
        return torch.empty(slot.shape, dtype=dtype, device=META)

    def float8(self, slot: TensorSlot) -> Float8Weight:
        """Scales have numbers: those by which random numbers of variance 1 get that of other weights."""
        numbers = torch.empty(slot.shape, dtype=torch.float8_e4m3fn, device=META)
        return Float8Weight(numbers, torch.full(scales_of(slot).shape, slot.shape[-1] ** -0.5))

    def is_float8(self, slot: TensorSlot) -> bool:
        """Whatever is to be so."""
        return True

    def check(self, slot: TensorSlot) -> str:
        return slot.name

    def stored_as(self, slot: TensorSlot, dtype: torch.dtype) -> bool:
        return True

    def release(self) -> None:
        pass


class RandomArena(WeightsArena):
    """Fills what has no memory with normal numbers of variance 1 / inputs, which keeps activations near 1,
    and vectors, which are norms, with 1. Numbers in float8 have variance 1, and scales."""

    def __init__(self, device: Any, size: int) -> None:
        super().__init__(device, size)
        self._device = device

    def stack(self, sources: Sequence[Tensor]) -> Tensor:
        first = sources[0]
        if not first.is_meta:
            return super().stack(sources)
        rows = sum(len(source) for source in sources)
        target = self.room.take((rows, *first.shape[1:]), first.dtype)
        if first.dim() == 1:
            target.fill_(1)
        elif first.dtype is torch.float8_e4m3fn:
            for piece in target.split(ROWS_AT_ONCE):
                piece.copy_(torch.empty_like(piece, dtype=torch.bfloat16).normal_())
        else:
            target.normal_(0, first.shape[-1] ** -0.5)
        self._device.finish()
        return target


@contextmanager
def random_weights(gpu: Gpu) -> Iterator[None]:
    """Engines that are built inside have random weights, and are on the device that is measured."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(build_runtime, "Checkpoint", ShapesOnly))
        patches.enter_context(patch.object(build_cuda, "WeightsArena", RandomArena))
        if gpu.interpreted:
            from gpu.interpreted import make_devices

            patches.enter_context(patch.object(build_cuda, "make_cuda_devices", make_devices))
        yield


def start_engine(gpu: Gpu, config: EngineConfig) -> Engine:
    with random_weights(gpu):
        return build_engine(config)


@contextmanager
def replaying(gpu: Gpu) -> Iterator[None]:
    """Engines that are built inside launch each pass of a decode, although the device has loops."""
    with patch.object(type(gpu.device), "loops", False):
        yield


def free_memory(gpu: Gpu) -> None:
    """Of engines and tensors that nobody has any more, before something large is made."""
    gc.collect()
    if not gpu.interpreted:
        torch.cuda.empty_cache()


class LoadedModel:
    """One model alone on the device, and a lane's words that lead to it."""

    def __init__(self, gpu: Gpu, spec: ModelSpec) -> None:
        self.spec = spec
        topology = Topology(("cuda:0",), ("cuda:0",))
        size = build_cuda.weights_bytes(spec, topology, KvDevice(0))[0] + build_cuda.bytes_between(spec)
        layout: KvLayout = make_layout(spec, choose_page_bytes([spec]))
        checkpoint: Any = ShapesOnly("random")
        arena = RandomArena(gpu.device, size)
        self.model = DeviceModel(spec, layout, load_attention_side(spec, checkpoint), {0: arena}, [0])
        for layer in range(spec.num_layers):
            self.model.put_ffn(layer, FfnPlace(0, 0, 1), load_ffn(spec, checkpoint, layer))
        self.model.finish(1)
        self._gpu = gpu

    def lane(self, queries: int) -> Tensor:
        """Of a pass of so many queries, each of a row of its own."""
        words = torch.zeros(LANE_WORDS, dtype=torch.int64)
        words[:MODEL_WORDS] = torch.tensor(self.model.lane_words(0))
        words[ROWS] = words[QUERIES] = queries
        return words.to(self._gpu.at)


def in_room(gpu: Gpu, make: Callable[[Room], T]) -> T:
    """What ``make`` makes in a room, in one that is as large as it needs."""
    sizing = Room(None)
    make(sizing)
    memory = gpu.device.tensor((max(1, sizing.used),), torch.uint8)
    zeros = gpu.device.tensor((max(1, sizing.zeros_used),), torch.int32)
    return make(Room(memory, zeros))


def spec_of(folder: Path, weights_dtype: str = "auto") -> ModelSpec:
    return read_spec(folder, weights_dtype=weights_dtype)
