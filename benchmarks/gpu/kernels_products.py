"""Norms, projections, expert choice and FFNs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.float8 import dequantise_fp8, quantise_fp8
from crosspool.kernels.interface import ExpertWeights
from crosspool.kernels.triton import words
from crosspool.kernels.triton.ffn import ffn
from crosspool.kernels.triton.ffn_plan import FfnGeometry, ffn_room, plan_ffn
from crosspool.kernels.triton.linear import Projection, linear, linear_room
from crosspool.kernels.triton.norm import embed, final_norm, layer_norm
from crosspool.kernels.triton.parts import add_parts
from crosspool.kernels.triton.router import Routing, route, router_room
from gpu.device import Gpu
from gpu.errors import TOLERANCES, error, misses, name_of
from gpu.results import Case, Figure
from helpers_triton_lanes import ModelWords, lane_of
from helpers_triton_tables import Lane

EPSILON = 1e-6
ROWS = [(7, 2), (0, 3), (4, 1)]

PROJECTIONS = {
    "qkv": Projection(5120, 2048, words.QKV),
    "output": Projection(2048, 4096, words.OUTPUT),
    "head": Projection(151_936, 2048, words.HEAD, of_lane=True),
}
ODD_PROJECTIONS = {
    "odd": Projection(70, 48, words.QKV),
    "biased": Projection(1000, 1100, words.OUTPUT, words.OUTPUT_BIAS),
}
ROUTINGS = {
    "qwen3-30b-a3b": (Routing(128, 8, normalise=True), 2048),
    "deepseek-v3": (Routing(256, 8, "sigmoid", True, 2.5, 8, 4, "top2_sum", True), 7168),
}
ODD_ROUTINGS = {"odd": (Routing(60, 3, scale=16.0, groups=3, top_groups=2), 136)}
FFNS = {
    "qwen3-30b-a3b": FfnGeometry(2048, 768, routing=Routing(128, 8, normalise=True)),
    "deepseek-v2-lite": FfnGeometry(2048, 1408, routing=Routing(64, 6), shared_width=2816),
    "dense": FfnGeometry(2048, 10_944),
}
ODD_FFNS = {
    "odd": FfnGeometry(72, 24, routing=Routing(5, 2, "sigmoid", scale=2.5), shared_width=56),
    "odd dense": FfnGeometry(40, 1100, "gelu"),
}


def normal(gpu: Gpu, *shape: int, dtype: torch.dtype, of: int | None = None) -> Tensor:
    """Of variance 1 / ``of``."""
    return gpu.random(*shape, dtype=dtype, deviation=(of or 1) ** -0.5)


def norms(gpu: Gpu, size: int, dtype: torch.dtype) -> list[Figure]:
    weights = [1 + normal(gpu, size, dtype=dtype, of=64) for _ in range(2)]
    table = normal(gpu, 11, size, dtype=dtype)
    layer = {words.INPUT_NORM: weights[0]}
    model = ModelWords([{}, layer], {words.FINAL_NORM: weights[1], words.EMBEDDING: table})
    batch = lane_of(model, ROWS)
    hidden, addend = (normal(gpu, 6, size, dtype=dtype) for _ in range(2))
    before, normed, last = hidden.clone(), torch.zeros_like(hidden), torch.zeros_like(hidden[:3])
    layer_norm(batch, 1, words.INPUT_NORM, hidden, addend, normed, EPSILON)
    final_norm(batch, before, addend, last, EPSILON)
    tokens = torch.tensor([3, 0, 10, 3, 5, 1], dtype=torch.int32, device=gpu.at)
    embedded = torch.zeros_like(hidden)
    embed(batch, tokens, embedded)
    stream = before + addend
    return [
        error("sum", hidden, stream, dtype),
        error("norm", normed, reference.rms_norm(stream, weights[0], EPSILON), dtype),
        error("final norm", last, reference.rms_norm(stream[[1, 4, 5]], weights[1], EPSILON), dtype),
        error("embedding", embedded, table[tokens.long()], dtype),
    ]


def parts(gpu: Gpu, size: int, dtype: torch.dtype) -> list[Figure]:
    pieces = normal(gpu, 3, 5, size, dtype=dtype)
    lane, out = Lane([{}], {words.QUERIES: 5}), torch.zeros(5, size, dtype=dtype, device=gpu.at)
    add_parts(lane.words, pieces, out)
    return [error("sum of parts", out, pieces.double().sum(0), dtype)]


def project(gpu: Gpu, projection: Projection, rows: int, dtype: torch.dtype) -> list[Figure]:
    outputs, inputs = projection.outputs, projection.inputs
    weight, bias = normal(gpu, outputs, inputs, dtype=dtype, of=inputs), normal(gpu, outputs, dtype=dtype)
    own: dict[int, Any] = {projection.word: weight, words.OUTPUT_BIAS: bias}
    count = {words.QUERIES: rows}
    lane = Lane([{}], count | own) if projection.of_lane else Lane([own], count)
    x = normal(gpu, rows, inputs, dtype=dtype)
    out = torch.zeros(rows, outputs, dtype=torch.float32 if projection.of_lane else dtype, device=gpu.at)
    chip = gpu.device.chip
    room = linear_room([projection], rows, dtype, chip, gpu.at)
    linear(projection, lane.words, 0, x, out, room, chip)
    wanted = x.double() @ weight.double().T
    if projection.bias is not None:
        wanted += bias.double()
    return [error("product", out, wanted, dtype)]


def choose(gpu: Gpu, routing: Routing, hidden: int, rows: int, dtype: torch.dtype) -> list[Figure]:
    """Equal but for logits that float32 and float64 order differently, should there be such."""
    weight, x = (
        normal(gpu, size, hidden, dtype=dtype, of=of) for size, of in ((routing.experts, hidden), (rows, 1))
    )
    bias = gpu.random(routing.experts, dtype=torch.float32) if routing.biased else None
    layer = {words.ROUTER: weight} | ({} if bias is None else {words.SELECTION_BIAS: bias})
    lane, chip = Lane([layer], {words.QUERIES: rows}), gpu.device.chip
    chosen = torch.zeros(rows, routing.top_k, dtype=torch.int32, device=gpu.at)
    gains = torch.zeros(rows, routing.top_k, device=gpu.at)
    room = router_room(routing, hidden, rows, dtype, chip, gpu.at)
    route(routing, lane.words, 0, x, chosen, gains, room, chip)
    ids, weights = reference_choice(routing, x, weight, bias)
    order = ids.argsort(-1)
    same = chosen == ids.gather(-1, order)
    figure = error("gains", gains * same, weights.gather(-1, order) * same, torch.float32)
    return [misses("experts", int((~same).sum())), figure]


def reference_choice(
    routing: Routing, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    rules = routing._asdict()
    del rules["experts"], rules["biased"]
    return reference.router(x, weight, bias, **rules)


def feed(gpu: Gpu, geometry: FfnGeometry, rows: int, dtype: torch.dtype) -> list[Figure]:
    routing, hidden, chip = geometry.routing, geometry.hidden, gpu.device.chip
    table: dict[int, Any] = {}
    make, number = partial(matrices, gpu, table, geometry, dtype), routing.experts if routing else 1
    experts = make(words.GATE_UP, number, geometry.width)
    shared = None
    if geometry.shared_width:
        (shared,) = make(words.SHARED_GATE_UP, 1, geometry.shared_width)
    if routing:
        table[words.ROUTER] = normal(gpu, routing.experts, hidden, dtype=dtype, of=hidden)
    x = normal(gpu, rows, hidden, dtype=dtype)
    lane, plan = Lane([table], {words.QUERIES: rows}), plan_ffn(geometry, rows, dtype, chip)
    out = torch.zeros_like(x)
    ffn(plan, lane.words, 0, x, out, ffn_room(plan, gpu.at))
    if routing is None:
        wanted = reference.dense_ffn(x.float(), experts[0], geometry.activation)
    else:
        ids, gains = reference_choice(routing, x, table[words.ROUTER], None)
        wanted = reference.moe_ffn(x.float(), ids, gains, experts, shared, geometry.activation)
    return [error("FFN", out, wanted, dtype)]


def matrices(
    gpu: Gpu,
    table: dict[int, Any],
    geometry: FfnGeometry,
    dtype: torch.dtype,
    word: int,
    count: int,
    width: int,
) -> list[ExpertWeights]:
    """Random experts in the table, and in float32 for the reference."""
    hidden = geometry.hidden
    gates, ups = (normal(gpu, count, width, hidden, dtype=dtype, of=hidden) for _ in range(2))
    downs = normal(gpu, count, hidden, width, dtype=dtype, of=width)
    if geometry.float8:
        pairs = [quantise_fp8(one) for one in (gates, ups, downs)]
        table[word], table[word + 1] = (torch.cat(both, 1) for both in zip(*pairs[:2], strict=True))
        table[word + 2], table[word + 3] = pairs[2][0], pairs[2][1].contiguous()
        gates, ups, downs = (dequantise_fp8(*pair) for pair in pairs)
    else:
        table[word], table[word + 2] = torch.cat((gates, ups), 1), downs
    wide = (one.float() for one in (gates, ups, downs))
    return [ExpertWeights(*expert) for expert in zip(*wide, strict=True)]


def cases(gpu: Gpu) -> list[Case]:
    made: list[Case] = []

    def add(name: str, run: Callable[..., list[Figure]], *arguments: object) -> None:
        made.append(Case(name, partial(run, gpu, *arguments)))

    tiny = gpu.interpreted
    sizes = (45,) if tiny else (2048, 45)
    projections = ODD_PROJECTIONS if tiny else PROJECTIONS | ODD_PROJECTIONS
    routings, ffns = (ODD_ROUTINGS, ODD_FFNS) if tiny else (ROUTINGS | ODD_ROUTINGS, FFNS | ODD_FFNS)
    for dtype in (torch.bfloat16,) if tiny else TOLERANCES:
        for size in sizes:
            add(f"norms of {size}, {name_of(dtype)}", norms, size, dtype)
            add(f"parts of {size}, {name_of(dtype)}", parts, size, dtype)
        for rows in (3,) if tiny else (8, 32, 300) if dtype is torch.bfloat16 else (8,):
            of = f"{rows} rows, {name_of(dtype)}"
            for name, projection in projections.items():
                if rows < 300 or not projection.of_lane:
                    add(f"linear {name}, {of}", project, projection, rows, dtype)
            for name, (routing, hidden) in routings.items():
                add(f"router {name}, {of}", choose, routing, hidden, rows, dtype)
            for name, geometry in ffns.items():
                add(f"ffn {name}, {of}", feed, geometry, rows, dtype)
                if dtype is torch.bfloat16:
                    add(f"ffn {name} in 8 bits, {of}", feed, geometry._replace(float8=True), rows, dtype)
    return made
