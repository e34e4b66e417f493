"""Who has which blocks of the context of a grant whose rows have pages on several KV devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosspool.core.batch import Grant, Row
from crosspool.core.device_pages import DevicePages
from crosspool.core.errors import InvariantError
from crosspool.kernels.numba.batch import BLOCK
from crosspool.workers.resident.control import STAGE_BITS
from crosspool.workers.resident.model import ResidentModel

KEPT_BYTES = 1 << 24
"""States of one round, if not even a query of each row takes more."""


@dataclass(frozen=True, slots=True)
class SpreadContext:
    """``blocks[row][group][part]`` are the numbers of a row's blocks that one device computes, int64; parts
    are in the order of the devices' teams. A block that lies on two devices is computed by that which has its
    last position: on the CPU it can read the other's memory. ``rounds`` and ``states`` as in
    kernels/numba/attention_spread.py and gqa_spread_room_bytes.
    """

    blocks: tuple[tuple[tuple[np.ndarray, ...], ...], ...]
    parts: int
    rounds: int
    states: int

    @property
    def words(self) -> int:
        """int64 words of all lists, with the length of each."""
        return sum(1 + len(part) for row in self.blocks for group in row for part in group)


def spread_context(
    grant: Grant, model: ResidentModel, places: DevicePages, teams: Sequence[int]
) -> SpreadContext | None:
    """None if all pages are at home. ``teams`` are those of all KV devices.

    Raises InvariantError for a page on a device that the grant does not name.
    """
    if not grant.elsewhere:
        return None
    devices = sorted((grant.kv_device, *grant.elsewhere), key=lambda device: teams[device])
    part_of = np.full(len(teams), -1)
    part_of[devices] = np.arange(len(devices))
    home = devices.index(grant.kv_device)
    blocks = tuple(
        tuple(_split(pages, row, model.layout.tokens_per_page, places, part_of, home) for pages in row.pages)
        for row in grant.rows
    )
    rounds, states = _rounds(grant, model)
    return SpreadContext(blocks, len(devices), rounds, states)


def _blocks_of(row: Row) -> int:
    """How many blocks a row has when it has made all its tokens."""
    return (row.start + len(row.tokens) + max(0, row.steps - 1) - 1) // BLOCK + 1


def _split(
    pages: Sequence[int], row: Row, tokens_per_page: int, places: DevicePages, part_of: np.ndarray, home: int
) -> tuple[np.ndarray, ...]:
    """The row's blocks in one layer group, by part. What has been given back is counted to the home: nobody
    sees it."""
    ends = BLOCK * (np.arange(_blocks_of(row)) + 1) - 1
    last = np.asarray(pages, np.int64)[np.minimum(ends // tokens_per_page, len(pages) - 1)]
    owners = part_of[np.searchsorted(places.starts, np.maximum(last, 0), "right") - 1]
    owners[last < 0] = home
    if owners.min() < 0:
        raise InvariantError(f"request {row.request} has pages on a KV device that its grant does not name")
    return tuple(np.flatnonzero(owners == part) for part in range(part_of.max() + 1))


def _rounds(grant: Grant, model: ResidentModel) -> tuple[int, int]:
    """The fewest rounds whose states fit KEPT_BYTES, and how many states a round has. A round has a query of
    each row at least, and rounds have to be stages that a position can count."""
    most = ((1 << STAGE_BITS) // grant.steps - 1) // model.spec.num_layers // 2 - 1
    most = min(most, max(len(row.tokens) for row in grant.rows))
    rounds = max(1, min(most, _states(grant, 1) * model.state_bytes // KEPT_BYTES))
    while rounds < most and _states(grant, rounds) * model.state_bytes > KEPT_BYTES:
        rounds += 1
    return rounds, _states(grant, rounds)


def _states(grant: Grant, rounds: int) -> int:
    return sum(-(-len(row.tokens) // rounds) * _blocks_of(row) for row in grant.rows)


def teams_of(grant: Grant, teams: Sequence[int]) -> int:
    """The teams that have a part of the context, a bit each; 0 if all is at home."""
    if not grant.elsewhere:
        return 0
    return sum(1 << teams[device] for device in (grant.kv_device, *grant.elsewhere))
