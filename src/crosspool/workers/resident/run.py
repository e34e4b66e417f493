"""What each thread of a team does in Python: enter the compiled loop, and come back when it stops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crosspool.backends.core_time import CoreWatch
from crosspool.kernels.numba.compile import Entry
from crosspool.workers.resident.attendance import call_all_soon, core_of
from crosspool.workers.resident.calls import NOT_CALLED, SLEEP_FOR
from crosspool.workers.resident.control import SLOTS
from crosspool.workers.resident.crew import (
    FFN_STAGE,
    GQA_SPREAD_STAGE,
    GQA_STAGE,
    HEAD_STAGE,
    MLA_SPREAD_STAGE,
    MLA_STAGE,
    Crew,
)
from crosspool.workers.resident.loop import SENT_HOME, follow, lead
from crosspool.workers.resident.order import COLUMNS
from crosspool.workers.resident.spread_stages import gqa_spread_stage, mla_spread_stage
from crosspool.workers.resident.stages import ffn_stage, gqa_stage, head_stage, mla_stage

ALL_TASKS = 2**62
LOOK_EVERY = 100_000_000
"""How often (ns) a thread that is not called looks whether its core is free."""

STAGES: dict[int, Entry] = {
    GQA_STAGE: gqa_stage,
    MLA_STAGE: mla_stage,
    FFN_STAGE: ffn_stage,
    HEAD_STAGE: head_stage,
}
SPREAD_STAGES: dict[int, Entry] = {
    GQA_SPREAD_STAGE: gqa_spread_stage,
    MLA_SPREAD_STAGE: mla_spread_stage,
}


def stage_addresses(
    report: Callable[[int, int], None] = lambda done, total: None, *, spread: bool = True
) -> np.ndarray:
    """The stages' addresses, int64 [6]; compiled first where they are not in the cache folder.

    Those of contexts on several devices are 0 unless ``spread``. ``report(done, total)`` is called as they
    come.
    """
    stages = STAGES | SPREAD_STAGES if spread else STAGES
    addresses = np.zeros(len(STAGES) + len(SPREAD_STAGES), np.int64)
    for done, (kind, stage) in enumerate(stages.items()):
        report(done, len(stages))
        addresses[kind] = stage.address
    report(len(stages), len(stages))
    return addresses


def run_leader(crew: Crew, index: int, tasks: int) -> None:
    """Lead until told to stop; with ``tasks`` above 0, come back to Python after so many each time."""
    own, mine = crew.own[index].ctypes.data, crew.mine[index].ctypes.data
    table = np.zeros((COLUMNS, SLOTS), np.int64)
    stopped = False
    while not stopped:
        stopped = lead(crew.address, own, mine, table, tasks or ALL_TASKS)


def run_member(crew: Crew, index: int, tasks: int) -> None:
    """Follow until sent home. While it is not called, it looks whether its core is free again; having said
    so, it sleeps like everybody else until there is work."""
    own, mine = crew.own[index].ctypes.data, crew.mine[index].ctypes.data
    watch = CoreWatch()
    taken, patience = 0, LOOK_EVERY
    while taken != SENT_HOME:
        number = follow(crew.address, own, mine, taken, tasks or ALL_TASKS, patience)
        if number != NOT_CALLED:
            taken, patience = number, LOOK_EVERY
        elif watch.is_free(core_of(crew.attendance, index)):
            call_all_soon(crew.attendance)
            patience = SLEEP_FOR
