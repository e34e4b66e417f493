"""Rows whose contexts lie in pages that are shuffled over an arena."""

from __future__ import annotations

import torch
from torch import Tensor

from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.words import QUERIES, ROWS
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits, carve_pass
from crosspool.workers.cuda.room import Room
from gpu.device import Gpu


def random_arena(gpu: Gpu, pages: int, page_bytes: int) -> Tensor:
    """uint8 [pages, page_bytes] of bfloat16 normal numbers."""
    return gpu.random(pages, page_bytes // 2).view(torch.uint8)


def decode_pass(gpu: Gpu, room: Room, geometry: Geometry, rows: int, context: int) -> Pass:
    """``rows`` rows of one query each, the last of a context; all pages are their own."""
    batch, _ = carve_pass(room, geometry, Limits(rows, rows))
    if batch.lane.is_meta:
        return batch
    chunks = geometry.layout.chunks(context)
    generator = torch.Generator().manual_seed(rows * context)
    pages = torch.randperm(rows * geometry.groups * chunks, generator=generator, dtype=torch.int32)
    batch.pages.fill_(-1)
    batch.pages[:, :, :chunks] = pages.view(rows, geometry.groups, chunks).to(gpu.at)
    batch.starts.copy_(torch.arange(rows + 1))
    batch.row_of.copy_(torch.arange(rows))
    batch.firsts.fill_(context - 1)
    batch.lane[ROWS] = batch.lane[QUERIES] = rows
    gpu.device.finish()
    return batch
