"""Layers of FFNs for kernels, as the weight table has them and as the reference reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.kernels.float8 import dequantise_fp8, quantise_fp8
from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.triton import words
from crosspool.kernels.triton.ffn_plan import FfnGeometry
from crosspool.kernels.triton.router import Routing
from crosspool.kernels.triton.tiles import Chip
from helpers_triton import DEVICE

CHIP = Chip(shared_bytes=232_448, has_float8=True)

GEOMETRIES = {
    "one of five": FfnGeometry(48, 24, routing=Routing(5, 1)),
    "three of seven": FfnGeometry(48, 40, routing=Routing(7, 3, normalise=True)),
    "shared": FfnGeometry(72, 24, routing=Routing(5, 2, "sigmoid", scale=2.5), shared_width=56),
    "dense": FfnGeometry(48, 40),
    "dense in parts": FfnGeometry(40, 1100, "gelu"),
}
IN_PARTS = {
    "dense": GEOMETRIES["dense in parts"],
    "experts": FfnGeometry(40, 1100, routing=Routing(3, 2)),
    "8 bits": FfnGeometry(136, 40, routing=Routing(3, 2), shared_width=1100, float8=True),
}


def random(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype).to(DEVICE)


@dataclass
class Layer:
    """One layer's weights, as the table has them and as the reference reads them."""

    words: dict[int, Tensor | int]
    experts: list[ExpertWeights]
    shared: ExpertWeights | None
    router: Tensor | None


def layer_of(geometry: FfnGeometry, dtype: torch.dtype, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    routing, hidden = geometry.routing, geometry.hidden
    table: dict[int, Tensor | int] = {}

    def matrices(experts: int, width: int, first: int) -> list[ExpertWeights]:
        gates, ups = (random(experts, width, hidden, generator=generator, dtype=dtype) for _ in range(2))
        downs = random(experts, hidden, width, generator=generator, dtype=dtype)
        if geometry.float8:
            (gates8, gate_scales), (ups8, up_scales), (downs8, down_scales) = map(
                quantise_fp8, (gates, ups, downs)
            )
            table[first], table[first + 1] = (
                torch.cat((gates8, ups8), 1),
                torch.cat((gate_scales, up_scales), 1),
            )
            table[first + 2], table[first + 3] = downs8, down_scales.contiguous()
            gates, ups = dequantise_fp8(gates8, gate_scales), dequantise_fp8(ups8, up_scales)
            downs = dequantise_fp8(downs8, down_scales)
        else:
            table[first], table[first + 2] = torch.cat((gates, ups), 1), downs
        return [ExpertWeights(*expert) for expert in zip(gates, ups, downs, strict=True)]

    experts = matrices(routing.experts if routing else 1, geometry.width, words.GATE_UP)
    shared = matrices(1, geometry.shared_width, words.SHARED_GATE_UP)[0] if geometry.shared_width else None
    router = None
    if routing:
        router = table[words.ROUTER] = random(routing.experts, hidden, generator=generator, dtype=dtype)
    return Layer(table, experts, shared, router)
