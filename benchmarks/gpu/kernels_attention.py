"""Attention and what stands before and after it, over pages of one of several layers and groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.triton import words
from crosspool.kernels.triton.attend import AttentionShape
from crosspool.kernels.triton.decode import attend_blocks, decode_attention
from crosspool.kernels.triton.gqa_write import gqa_write
from crosspool.kernels.triton.latents import latents_into_values, queries_into_latents
from crosspool.kernels.triton.mla_write import mla_write, rotate_queries
from crosspool.kernels.triton.prefill import attend_part, prefill_attention
from crosspool.kernels.triton.states import States, merge_states
from gpu.device import Gpu
from gpu.errors import TOLERANCES, error, name_of
from gpu.results import Case, Figure
from helpers_triton_attention import Rows
from helpers_triton_lanes import Arena, ModelWords, lane_of

EPSILON, GAIN, TOKENS = 1e-6, 1.25, 21
REAL = {
    "qwen3-30b-a3b": AttentionShape(32, 4, 128, 0, 128**-0.5),
    "deepseek-v2-lite": AttentionShape(16, 1, 512, 64, 192**-0.5),
}
ODD = {"odd groups": AttentionShape(6, 2, 80, 0, 0.1), "odd latents": AttentionShape(36, 1, 83, 6, 0.12)}
DECODES = [(0, 1), (255, 1), (256, 1), (1023, 1), (4999, 1)]
CHUNKS = [(0, 1), (250, 20), (0, 300), (2047, 130)]
WRITES = [(0, 3), (61, 1), (32, 5), (16, 1)]


def decode(gpu: Gpu, shape: AttentionShape, dtype: torch.dtype, window: int, at: list[Any]) -> list[Figure]:
    rows = Rows(at, shape, dtype, TOKENS, window)
    query, out = rows.room()
    states = States.room(shape, len(query), at[-1][0] + 1, 1, gpu.at)
    splits = min(states.most_blocks, 8)
    decode_attention(rows.batch(), rows.arena.kv(window), shape, query, states, out, splits)
    return [error("decode", out[: len(rows.query)], rows.expected(), dtype)]


def prefill(gpu: Gpu, shape: AttentionShape, dtype: torch.dtype, window: int, at: list[Any]) -> list[Figure]:
    rows = Rows(at, shape, dtype, TOKENS, window)
    query, out = rows.room()
    prefill_attention(rows.batch(), rows.arena.kv(window), shape, query, out)
    return [error("prefill", out[: len(rows.query)], rows.expected(), dtype)]


def merge(gpu: Gpu, shape: AttentionShape, dtype: torch.dtype, at: list[Any]) -> list[Figure]:
    """Contexts whose pages are on three devices: blocks of each, and all of each as one."""
    rows = Rows(at, shape, dtype, TOKENS)
    batch, kv = rows.batch(), rows.arena.kv()
    owner = torch.randint(0, 3, batch.pages.shape, generator=torch.Generator().manual_seed(2)).to(gpu.at)
    own = [batch._replace(pages=batch.pages.where(owner == part, -1)) for part in range(3)]
    figures = []
    for name, context, window in (
        ("merge of blocks", max(first for first, _ in at) + 1, 0),
        ("of parts", 1, None),
    ):
        query, out = rows.room()
        states = States.room(shape, len(query), context, 3, gpu.at)
        for part, batch_of in enumerate(own):
            if window is None:
                attend_part(batch_of, kv, shape, query, states.part(part))
            else:
                attend_blocks(batch_of, kv, shape, query, states.part(part), 2)
        merge_states(batch, states, window, out)
        figures.append(error(name, out[: len(rows.query)], rows.expected(), dtype))
    return figures


class Turn(NamedTuple):
    """Frequencies of a rotary embedding, and the positions of the queries of WRITES with their turns."""

    frequencies: Tensor
    positions: Tensor
    row_of: Tensor
    cos_sin: tuple[Tensor, Tensor]

    @staticmethod
    def of(rotary: int) -> Turn:
        frequencies = 10_000.0 ** -(torch.arange(0, rotary, 2) / rotary)
        positions = torch.cat([torch.arange(first, first + count) for first, count in WRITES])
        row_of = torch.repeat_interleave(torch.arange(len(WRITES)), torch.tensor([n for _, n in WRITES]))
        angles = torch.outer(positions.double(), frequencies.double())
        cos_sin = (angles.cos().float() * GAIN, angles.sin().float() * GAIN)
        return Turn(frequencies, positions, row_of, cos_sin)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(arena: Arena, turn: Turn) -> Tensor:
    """What is in the pages at the queries' positions."""
    pages = arena.pages[turn.row_of, 1, turn.positions // TOKENS]
    return arena.tokens()[
        pages.to(arena.whole.device), (turn.positions % TOKENS).to(arena.whole.device)
    ].cpu()


def write_gqa(
    gpu: Gpu, shape: AttentionShape, rotary: int, interleaved: bool, dtype: torch.dtype
) -> list[Figure]:
    heads, kv_heads, width, turn = shape.heads, shape.kv_heads, shape.width, Turn.of(rotary)
    count = len(turn.positions)
    projected = drawn(count, heads + 2 * kv_heads, width, dtype=dtype, seed=0)
    norms = [1 + drawn(width, dtype=dtype, seed=seed) / 8 for seed in (1, 2)]
    layer = {words.QUERY_NORM: norms[0], words.KEY_NORM: norms[1]}
    model = ModelWords([{}, layer], {words.FREQUENCIES: turn.frequencies})
    arena = Arena([first + n for first, n in WRITES], (2, kv_heads, width), TOKENS, dtype)
    query = torch.zeros(count, heads, width, dtype=dtype, device=gpu.at)
    batch, how = lane_of(model, WRITES, arena.pages), {"interleaved": interleaved, "gain": GAIN}
    gqa_write(
        batch, arena.kv(), 1, projected.to(gpu.at), query, kv_heads, rotary, **how, norm_epsilon=EPSILON
    )
    parts = projected.split([heads, kv_heads, kv_heads], 1)
    normed = [reference.rms_norm(part, norm, EPSILON) for part, norm in zip(parts, norms, strict=False)]
    wanted = [reference.rope(part, *turn.cos_sin, interleaved) for part in normed]
    kept = written(arena, turn)
    return [
        error("queries", query, wanted[0], dtype),
        error("keys", kept[:, 0], wanted[1], dtype),
        error("values", kept[:, 1], parts[2], dtype),
    ]


def write_mla(
    gpu: Gpu, shape: AttentionShape, own_rank: int, interleaved: bool, dtype: torch.dtype
) -> list[Figure]:
    heads, rank, rotary, turn, nope = shape.heads, shape.width, shape.rotary, Turn.of(shape.rotary), 40
    count = len(turn.positions)
    down = drawn(count, own_rank + rank + rotary, dtype=dtype, seed=0)
    projected = drawn(count, heads, nope + rotary, dtype=dtype, seed=1)
    norms = [1 + drawn(max(size, 1), dtype=dtype, seed=2) / 8 for size in (rank, own_rank)]
    layer = {words.LATENT_NORM: norms[0], words.QUERY_NORM: norms[1]}
    model = ModelWords([{}, layer], {words.FREQUENCIES: turn.frequencies})
    arena = Arena([first + n for first, n in WRITES], (1, rank + rotary), TOKENS, dtype)
    batch, how = lane_of(model, WRITES, arena.pages), {"interleaved": interleaved, "gain": GAIN}
    latent = torch.zeros(count, own_rank, dtype=dtype, device=gpu.at) if own_rank else None
    mla_write(batch, arena.kv(), 1, down.to(gpu.at), latent, rotary, **how, norm_epsilon=EPSILON)
    query = torch.zeros(count, heads, rank + rotary, dtype=dtype, device=gpu.at)
    rotate_queries(batch, projected.to(gpu.at), query, rotary, **how)
    own, kv, key = down.split([own_rank, rank, rotary], 1)
    kept = written(arena, turn)[:, 0]
    turned = reference.rope(key.unsqueeze(1), *turn.cos_sin, interleaved).squeeze(1)
    wanted = reference.rope(projected[..., nope:], *turn.cos_sin, interleaved)
    figures = [
        error("latents", kept[:, :rank], reference.rms_norm(kv, norms[0], EPSILON), dtype),
        error("rotary keys", kept[:, rank:], turned, dtype),
        error("rotary queries", query[..., rank:], wanted, dtype),
    ]
    if latent is not None:
        figures.append(error("query latents", latent, reference.rms_norm(own, norms[1], EPSILON), dtype))
    return figures


def latents(gpu: Gpu, shape: AttentionShape, queries: int, dtype: torch.dtype) -> list[Figure]:
    heads, rank, rotary, nope, value = shape.heads, shape.width, shape.rotary, 72, 40
    key = drawn(heads, nope, rank, dtype=dtype, seed=0) / nope**0.5
    out_of = drawn(heads, value, rank, dtype=dtype, seed=1) / rank**0.5
    model = ModelWords([{words.EXPAND_KEY: key, words.EXPAND_VALUE: out_of}])
    batch = lane_of(model, [(0, queries)])
    projected = drawn(queries, heads, nope + rotary, dtype=dtype, seed=2)
    attended = drawn(queries, heads, rank, dtype=dtype, seed=3)
    query = torch.zeros(queries, heads, rank + rotary, dtype=dtype, device=gpu.at)
    values = torch.zeros(queries, heads, value, dtype=dtype, device=gpu.at)
    queries_into_latents(batch, 0, projected.to(gpu.at), nope, query)
    latents_into_values(batch, 0, attended.to(gpu.at), values)
    into = torch.einsum("thn,hnr->thr", projected[..., :nope].double(), key.double())
    out = torch.einsum("thr,hvr->thv", attended.double(), out_of.double())
    return [error("into latents", query[..., :rank], into, dtype), error("into values", values, out, dtype)]


def cases(gpu: Gpu) -> list[Case]:
    made: list[Case] = []

    def add(name: str, run: Callable[..., list[Figure]], *arguments: object) -> None:
        made.append(Case(name, partial(run, gpu, *arguments)))

    tiny = gpu.interpreted
    shapes = dict(ODD) if tiny else REAL | ODD
    decodes, chunks = (DECODES[:3], CHUNKS[:2]) if tiny else (DECODES, CHUNKS)
    for dtype in (torch.bfloat16,) if tiny else TOLERANCES:
        for name, shape in shapes.items():
            what = f"{name}, {name_of(dtype)}"
            for window in (0, 300) if name in ODD and not tiny else (0,):
                of = f", window {window}" if window else ""
                add(f"decode {what}{of}", decode, shape, dtype, window, decodes)
                add(f"prefill {what}{of}", prefill, shape, dtype, window, chunks)
            add(f"merge {what}", merge, shape, dtype, decodes)
            for interleaved in (False, True):
                pairs = "neighbours" if interleaved else "halves"
                if shape.rotary:
                    add(f"mla_write {what}, {pairs}", write_mla, shape, 37 * interleaved, interleaved, dtype)
                else:
                    rotary = shape.width - 16 * interleaved
                    add(f"gqa_write {what}, {pairs}", write_gqa, shape, rotary, interleaved, dtype)
            for queries in ((3,) if tiny else (1, 37, 300)) if shape.rotary else ():
                add(f"latents {what}, {queries} queries", latents, shape, queries, dtype)
    return made
