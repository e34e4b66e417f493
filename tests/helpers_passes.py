"""Passes and teams for the tests of compiled kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.numba.batch import Pass
from crosspool.kernels.numba.matrix import CODES
from crosspool.kernels.numba.team import SHARED_WORDS, new_own

GUARD = 64
RUBBISH = 0xAB


def pass_of(
    batch: AttentionBatch,
    dtype: torch.dtype,
    hidden_size: int = 0,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Pass:
    """The compiled kernels' view of a batch; the batch's page tables must stay alive. ``angles``: cosines and
    sines float32 [T, half]."""
    cos, sin = angles if angles is not None else (torch.empty(0, 0),) * 2
    starts, tables = np.array(batch.query_starts), batch.page_tables
    return Pass(
        rows=batch.num_rows,
        queries=int(starts[-1]),
        dtype=CODES[dtype],
        hidden_size=hidden_size,
        starts=starts,
        firsts=np.array(batch.first_positions),
        row_of=np.repeat(np.arange(batch.num_rows), np.diff(starts)),
        tables=np.array([table.data_ptr() for row in tables for table in row]),
        groups=len(tables[0]),
        cos=cos.contiguous().flatten().numpy(),
        sin=sin.contiguous().flatten().numpy(),
        half=cos.shape[1],
    )


def rubbish(size: int) -> np.ndarray:
    """Scratch of ``size`` bytes, full of rubbish and guarded at its end."""
    return np.full(size + GUARD, RUBBISH, np.uint8)


def on_a_team(run: Callable[[int, np.ndarray, int, int], None], threads: int, room: int, mine: int) -> None:
    """``run(shared, own, room, mine)`` on every thread of a team, with scratch of so many bytes. Fails if
    something is written beyond it."""
    shared, place = np.zeros(SHARED_WORDS, np.int64), rubbish(room)
    places = [rubbish(mine) for _ in range(threads)]
    members = [
        threading.Thread(
            target=run,
            args=(shared.ctypes.data, new_own(i, threads), place.ctypes.data, places[i].ctypes.data),
        )
        for i in range(threads)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert all((own[-GUARD:] == RUBBISH).all() for own in (place, *places))
