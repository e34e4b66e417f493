"""One pass of one micro-batch as compiled code sees it, and where the KV of one layer lies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import words

BLOCK = 256
"""Positions of a block of attention."""

TILE = 48
"""Query heads of one key-value head that go over a block together: what they need stays in cache."""


class Pass(NamedTuple):
    """``queries`` tokens of ``rows`` rows, in model type ``dtype`` and of ``hidden_size`` elements each.

    Row r owns queries ``starts[r]`` to ``starts[r + 1] - 1``, the first of which is at absolute position
    ``firsts[r]``; query t belongs to row ``row_of[t]``. ``tables[r * groups + g]`` is the address of row r's
    page ids (int64) in layer group g. ``cos`` and ``sin`` are float32 [queries * half] with ``half`` pairs a
    query. All other arrays are int64.
    """

    rows: int
    queries: int
    dtype: int
    hidden_size: int
    starts: np.ndarray
    firsts: np.ndarray
    row_of: np.ndarray
    tables: np.ndarray
    groups: int
    cos: np.ndarray
    sin: np.ndarray
    half: int


class KvPlace(NamedTuple):
    """One layer's KV: in page p of the arena at address ``arena``, its region begins at byte ``p * page_bytes
    + offset``; inside it is as in core/kv_layout.py. ``group`` says whose page tables to read, ``window`` is
    how many of the last positions a token sees (0: all)."""

    arena: int
    page_bytes: int
    offset: int
    tokens_per_page: int
    group: int
    window: int


@inline
def position_of(batch, query):
    """The absolute position of a query."""
    row = batch.row_of[query]
    return batch.firsts[row] + query - batch.starts[row]


@inline
def first_seen(position, window):
    """The first position that a query at ``position`` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@inline
def region_of(batch, kv, row, chunk):
    """The address of the layer's region in the page of a row that holds chunk number ``chunk``."""
    page = words(batch.tables[row * batch.groups + kv.group], chunk + 1)[chunk]
    return kv.arena + page * kv.page_bytes + kv.offset


@kernel
def rope_angles(position, frequencies, gain, cos, sin):
    """Fill ``cos`` and ``sin`` (float32 [half]) for one position, from the angle per position of each pair
    (float32 [half]). The arithmetic is float32, as that of models/layers.py."""
    for pair in range(len(frequencies)):
        angle = np.float32(position) * frequencies[pair]
        cos[pair] = np.cos(angle) * np.float32(gain)
        sin[pair] = np.sin(angle) * np.float32(gain)
